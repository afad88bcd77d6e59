"""Figures of a run, counted once and shown by the status, the metrics and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from maskwire.v1.values import Outcome
from maskwire_server.events import StepCommitted

STEP_PHASES = ("queue", "compute", "commit")
"""The phases of a step: it waits in the queue, is computed, and becomes durable."""


@dataclass(frozen=True)
class HistogramFigures:
    """A histogram of durations, in seconds."""

    bounds: tuple[float, ...]
    """The upper ends of the buckets, inclusive; the last bucket has none."""
    counts: tuple[int, ...]
    """The number of values per bucket; one more than bounds."""
    total: float
    """The sum of the values."""

    @property
    def count(self) -> int:
        """The number of values in all buckets."""
        return sum(self.counts)


@dataclass(frozen=True)
class Recent:
    """The speed of the last minute, and the mean seconds of its steps by phase; None if it had no step."""

    steps_per_second: float
    tokens_per_second: float
    queue_seconds: float | None = None
    compute_seconds: float | None = None
    commit_seconds: float | None = None


NOTHING_RECENT = Recent(0.0, 0.0)


@dataclass(frozen=True)
class RunFigures:
    """Figures of a run, counted since the server process started."""

    recent: Recent = NOTHING_RECENT
    steps: Mapping[Outcome, int] = field(default_factory=dict)
    """The number of durable steps, by outcome."""
    tokens: int = 0
    """Maskable and prompt tokens of the durable steps."""
    newest_step: StepCommitted | None = None
    step_seconds: Mapping[str, HistogramFigures] = field(default_factory=dict)
    """The durations of the steps, by phase, one of STEP_PHASES."""
    commit_seconds: HistogramFigures | None = None
    """The durations of the journal's transactions."""
    checkpoint_seconds: HistogramFigures | None = None
    recovery_seconds: Mapping[str, float] = field(default_factory=dict)
    """The time of each phase of the start, one of events.RECOVERY_PHASES, without phases that did not run."""
    calls: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """Calls that ended, by method, status code and reason."""
    events_dropped: Mapping[str, int] = field(default_factory=dict)
    """Events that each subscriber has lost."""
