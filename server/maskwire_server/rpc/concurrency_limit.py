"""Limits on how many calls of one kind run at a time, and on the share of time that they take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from maskwire_server.errors import Refused


class ConcurrencyLimit:
    """A context manager for calls that occupy a worker for a long time; a call over the limit is refused."""

    def __init__(self, limit: int, calls: str) -> None:
        """`limit` is the number of calls at a time. `calls` is their plural name, for the error message."""
        self._limit = limit
        self._calls = calls
        self._slots = threading.Semaphore(limit)

    def __enter__(self) -> None:
        """Take a slot. Raises Refused with the reason QUEUE_FULL if all slots are taken."""
        if not self._slots.acquire(blocking=False):
            raise Refused(
                "QUEUE_FULL",
                f"the limit of {self._limit} {self._calls} at a time is reached; retry when one has ended",
                queue_limit=self._limit,
            )

    def __exit__(self, *_: object) -> None:
        """Release the slot."""
        self._slots.release()


class PacedCalls:
    """A context manager that runs calls one at a time, and leaves at least half of the time to training.

    After a call that took t seconds from training, the next call begins at least t seconds later.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._one_at_a_time = threading.Lock()
        self._next = clock()

    def __enter__(self) -> Self:
        """Wait until this call may begin."""
        self._one_at_a_time.acquire()
        self._sleep(max(0.0, self._next - self._clock()))
        return self

    def took(self, seconds: float) -> None:
        """Record how long the call held up training, without its own wait for the disk or the mirror."""
        self._next = self._clock() + seconds

    def __exit__(self, *_: object) -> None:
        """End this call, so that the next call may begin."""
        self._one_at_a_time.release()
