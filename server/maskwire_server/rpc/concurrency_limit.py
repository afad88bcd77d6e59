"""Bounds on how many calls of one kind run at the same time, and on how much of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from maskwire_server.errors import Refused


class ConcurrencyLimit:
    """A context manager for calls that occupy a worker for a long time; a call over the limit is refused."""

    def __init__(self, limit: int, calls: str) -> None:
        """`calls` names the calls in the error message, in the plural."""
        self._limit = limit
        self._calls = calls
        self._slots = threading.Semaphore(limit)

    def __enter__(self) -> None:
        """Take a slot. Raises Refused with QUEUE_FULL if all are taken."""
        if not self._slots.acquire(blocking=False):
            raise Refused(
                "QUEUE_FULL",
                f"the limit of {self._limit} {self._calls} at a time is reached; retry when one has ended",
                queue_limit=self._limit,
            )

    def __exit__(self, *_: object) -> None:
        """Release the slot."""
        self._slots.release()


class Turns:
    """A context manager for calls that take time from training: one at a time, at most half of the time.

    A call begins when the one before it has ended for as long as that one took from training.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()
        self._next = clock()

    def __enter__(self) -> Self:
        """Wait for the turn."""
        self._turn.acquire()
        self._sleep(max(0.0, self._next - self._clock()))
        return self

    def took(self, seconds: float) -> None:
        """Note how long the call took from training, without its wait for the disk or the mirror."""
        self._next = self._clock() + seconds

    def __exit__(self, *_: object) -> None:
        """End the turn."""
        self._turn.release()
