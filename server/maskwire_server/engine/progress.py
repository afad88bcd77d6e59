"""What a thread of the engine is doing, and whether it makes progress. The watchdog reads it."""

from __future__ import annotations


class Progress:
    """The progress of one thread, which writes it. The watchdog reads it without a lock."""

    def __init__(self) -> None:
        self.doing = ""
        """What the thread works on; empty: it waits for work."""
        self.beats = 0
        """Incremented when work begins, when a part of it is done, and when it ends."""
        self.limit = 0.0
        """Seconds without progress after which the work counts as hung."""

    def begin(self, what: str, limit: float) -> None:
        """Note that work begins. It counts as hung after `limit` seconds without progress."""
        self.limit = limit
        self.beats += 1
        self.doing = what

    def beat(self) -> None:
        """Note that a part of the work is done."""
        self.beats += 1

    def end(self) -> None:
        """Note that the work has ended."""
        self.doing = ""
        self.beats += 1
