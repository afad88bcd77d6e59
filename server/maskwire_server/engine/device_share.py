"""How the device is divided between training steps and reads (evaluations and generations).

While a client trains, steps get the device for t seconds after a read of t seconds. A read that keeps a step
or a save waiting for longer than `serve.max_read_seconds` is ended. As a result, reads cost a training client
at most half of its throughput, and a step waits for at most one read.
"""

from __future__ import annotations

from collections.abc import Callable

IDLE_SECONDS = 5.0
"""A client counts as training for this long after its last step, so that reads do not fill each pause between
two steps of a client that sends one at a time."""


class DeviceSharing:
    """Counts the device's seconds for steps and for reads, and decides when a read may begin.

    Only the executor's thread changes the counts. Status reports read them without a lock.
    """

    def __init__(self, clock: Callable[[], float], max_read_seconds: float) -> None:
        self._clock = clock
        self._max_read_seconds = max_read_seconds
        self.step_seconds = 0.0
        """Seconds spent on training steps since the process started."""
        self.read_seconds = 0.0
        """Seconds spent on evaluations and generations since the process started."""
        self.owed_seconds = 0.0
        """Seconds that steps still get before the next read begins, while a client trains."""
        self.ended_reads = 0
        """The number of reads that were ended because a step or save had waited for too long."""
        self.refused_reads = 0
        """The number of reads that were refused because too many waited."""
        self._last_step: float | None = None  # when it ended
        self._free_since = 0.0  # when the last step or read ended
        self._read_began = 0.0

    def seconds_until_read(self, *, step_waits: bool) -> float:
        """Seconds until a read may begin; 0 if it may begin now.

        `step_waits` says whether a step is queued. It goes first until steps have had their time.
        """
        if self.owed_seconds <= 0:
            return 0.0
        if step_waits:
            return self.owed_seconds
        if self._last_step is None:
            return 0.0
        return max(0.0, self._last_step + min(self.owed_seconds, IDLE_SECONDS) - self._clock())

    def begin_read(self) -> None:
        """Note that a read (an evaluation or generation) begins."""
        self._read_began = self._clock()

    @property
    def reading_seconds(self) -> float:
        """Seconds since the running read began."""
        return self._clock() - self._read_began

    def end_read(self) -> None:
        """Note that the read has ended. Steps now get the device for as long as the read took."""
        now = self._clock()
        self.owed_seconds = now - self._read_began
        self.read_seconds += self.owed_seconds
        self._free_since = now

    def end_step(self, began: float) -> None:
        """Note that a step has ended. A short idle pause before it counts as time for steps."""
        now = self._clock()
        self.step_seconds += now - began
        pause = began - self._free_since
        if self.owed_seconds > 0:
            self.owed_seconds -= now - (self._free_since if 0 <= pause < IDLE_SECONDS else began)
            self.owed_seconds = max(0.0, self.owed_seconds)
        self._last_step = self._free_since = now

    def read_is_overdue(self, arrived: float | None) -> bool:
        """Whether a step or save that arrived at `arrived` has waited too long for the running read."""
        if arrived is None:
            return False
        return self._clock() - max(arrived, self._read_began) >= self._max_read_seconds
