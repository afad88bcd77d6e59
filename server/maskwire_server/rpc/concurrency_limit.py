"""A bound on how many calls of one kind run at the same time."""

from __future__ import annotations

import threading

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
