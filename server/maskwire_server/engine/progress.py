"""What a thread of the engine is doing, and whether it makes progress. The watchdog reads it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """The progress of one thread. This thread updates it, and the watchdog reads it without a lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at = clock()
        self.doing = ""
        """What the thread works on; empty if it waits for work."""
        self.beats = 0
        """Incremented when work begins, when a part of it is done, and when it ends."""
        self.limit = 0.0
        """Seconds without progress after which the work counts as hung."""

    def begin(self, what: str, limit: float) -> None:
        """Note that work begins. It counts as hung after `limit` seconds without progress."""
        self.limit = limit
        self.beat()
        self.doing = what

    def beat(self) -> None:
        """Note that a part of the work is done."""
        self._beat_at = self._clock()
        self.beats += 1

    def end(self) -> None:
        """Note that the work has ended."""
        self.doing = ""
        self.beats += 1

    @property
    def seconds_without(self) -> float:
        """Seconds since the work that is under way last made progress; 0 if the thread waits for work."""
        return self._clock() - self._beat_at if self.doing else 0.0
