"""Figures of a run: what status, metrics and the command line show, counted once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from maskwire.v1.values import Outcome
from maskwire_server.events import StepCommitted

STEP_PHASES = ("queue", "compute", "commit")
"""A step waits, is computed, and becomes durable."""


@dataclass(frozen=True)
class HistogramFigures:
    """A distribution of seconds."""

    bounds: tuple[float, ...]
    """The upper ends of the buckets, inclusive; the last bucket has none."""
    counts: tuple[int, ...]
    """The number of values per bucket; one more than bounds."""
    total: float
    """The sum of the values."""

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)


@dataclass(frozen=True)
class Recent:
    """Figures of the last minute: speed, and mean seconds per step, which are None without a step."""

    steps_per_second: float
    tokens_per_second: float
    queue_seconds: float | None = None
    compute_seconds: float | None = None
    commit_seconds: float | None = None


NOTHING_RECENT = Recent(0.0, 0.0)


@dataclass(frozen=True)
class RunFigures:
    """Figures counted since the process started."""

    recent: Recent = NOTHING_RECENT
    steps: Mapping[Outcome, int] = field(default_factory=dict)
    """The number of durable steps, by outcome."""
    tokens: int = 0
    """Maskable and prompt tokens of the durable steps."""
    newest_step: StepCommitted | None = None
    step_seconds: Mapping[str, HistogramFigures] = field(default_factory=dict)
    """The time of each phase of a step, by phase, one of STEP_PHASES."""
    commit_seconds: HistogramFigures | None = None
    """The time of the journal's transactions."""
    checkpoint_seconds: HistogramFigures | None = None
    recovery_seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase of the start, one of events.RECOVERY_PHASES; a phase that was not needed is absent."""
    calls: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """Calls that ended, by method, status code and reason."""
    events_dropped: Mapping[str, int] = field(default_factory=dict)
    """Events that each subscriber has lost."""
