"""What a thread of the engine is doing, and whether it makes progress: for the watchdog."""

from __future__ import annotations


class Progress:
    """Written by one thread, read by the watchdog without a lock."""

    def __init__(self) -> None:
        self.doing = ""
        """What the thread works on; empty: it waits for work."""
        self.beats = 0
        """Grows with every beginning, end and part of the work."""
        self.limit = 0.0
        """Seconds without progress after which the work counts as hung."""

    def begin(self, what: str, limit: float) -> None:
        """Work begins that is hung if it makes no progress for `limit` seconds."""
        self.limit = limit
        self.beats += 1
        self.doing = what

    def beat(self) -> None:
        """A part of the work is done."""
        self.beats += 1

    def end(self) -> None:
        """The work has ended."""
        self.doing = ""
        self.beats += 1
