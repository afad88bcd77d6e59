"""How the device is divided between training steps and reads (evaluations and generations).

After a read of t seconds, steps get the device for t seconds before the next read, while a client trains. A
read that keeps a step or a save waiting for longer than `serve.max_read_seconds` is ended. Together: readers
cost a training client at most half of its throughput, and a step waits for one read, never for a queue of
them.
"""

from __future__ import annotations

from collections.abc import Callable

IDLE_SECONDS = 5.0
"""A client counts as training for this long after its last step, so that reads do not fill each pause between
two steps of a client that sends one at a time."""


class DeviceShare:
    """Counts seconds of the device. The executor's thread writes; status reports read without a lock."""

    def __init__(self, clock: Callable[[], float], max_read_seconds: float) -> None:
        self._clock = clock
        self._max_read_seconds = max_read_seconds
        self.step_seconds = 0.0
        """Spent on training steps since the process started."""
        self.read_seconds = 0.0
        """Spent on evaluations and generations since the process started."""
        self.owed_seconds = 0.0
        """How much steps get before the next read begins, while a client trains."""
        self.ended_reads = 0
        """Reads that were ended because a step or save had waited for too long."""
        self.refused_reads = 0
        """Reads that were refused because too many waited."""
        self._last_step: float | None = None  # when it ended
        self._free_since = 0.0  # when the last step or read ended
        self._read_began = 0.0

    def seconds_until_read(self, *, step_waits: bool) -> float:
        """Seconds for which no read may begin; 0: a read may begin now. While a step waits, it goes first."""
        if self.owed_seconds <= 0:
            return 0.0
        if step_waits:
            return self.owed_seconds
        if self._last_step is None:
            return 0.0
        return max(0.0, self._last_step + min(self.owed_seconds, IDLE_SECONDS) - self._clock())

    def begin_read(self) -> None:
        """Note that a read begins."""
        self._read_began = self._clock()

    @property
    def reading_seconds(self) -> float:
        """How long the running read has taken."""
        return self._clock() - self._read_began

    def end_read(self) -> None:
        """Note that the read has ended: steps get as much time as it took."""
        now = self._clock()
        self.owed_seconds = now - self._read_began
        self.read_seconds += self.owed_seconds
        self._free_since = now

    def end_step(self, began: float) -> None:
        """Note that a step has ended. A short pause before it without a read counts as step time."""
        now = self._clock()
        self.step_seconds += now - began
        pause = began - self._free_since
        if self.owed_seconds > 0:
            self.owed_seconds -= now - (self._free_since if 0 <= pause < IDLE_SECONDS else began)
            self.owed_seconds = max(0.0, self.owed_seconds)
        self._last_step = self._free_since = now

    def read_is_overdue(self, arrived: float | None) -> bool:
        """Whether the running read has kept a step or save that arrived then waiting for too long."""
        if arrived is None:
            return False
        return self._clock() - max(arrived, self._read_began) >= self._max_read_seconds
