"""Aggregates of a run's events (counts, rates and histograms) for status, metrics and the command line."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from maskwire.v1.values import Outcome
from maskwire_server.engine.throughput import Rate
from maskwire_server.events import (
    CallEnded,
    CheckpointWritten,
    Committed,
    Event,
    RecoveryPhase,
    StepCommitted,
)
from maskwire_server.run_figures import STEP_PHASES, HistogramFigures, Recent, RunFigures

STEP_BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-4, 3) for digit in (1, 2.5, 5))
"""Bounds of the histogram's buckets in seconds: 0.1 ms to 500 s."""
CHECKPOINT_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)


class Aggregates:
    """Counts events as they are published. Any thread may call its methods; each takes microseconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._rate = Rate(60, clock)
        self._steps: Counter[Outcome] = Counter()
        self._tokens = 0
        self._newest_step: StepCommitted | None = None
        self._phases = tuple(_Histogram(STEP_BOUNDS) for _ in STEP_PHASES)
        self._commits = _Histogram(STEP_BOUNDS)
        self._checkpoints = _Histogram(CHECKPOINT_BOUNDS)
        self._recovery: dict[str, float] = {}
        self._calls: Counter[tuple[str, str, str]] = Counter()

    def add(self, event: Event) -> None:
        """Add an event to the counts, rates and histograms."""
        with self._lock:
            if isinstance(event, StepCommitted):
                self._add_step(event)
            elif isinstance(event, CallEnded):
                self._calls[event.method, event.code, event.reason] += 1
            elif isinstance(event, Committed):
                self._commits.add(event.seconds)
            elif isinstance(event, CheckpointWritten):
                self._checkpoints.add(event.seconds)
            elif isinstance(event, RecoveryPhase):
                self._recovery[event.phase] = self._recovery.get(event.phase, 0.0) + event.seconds

    def _add_step(self, event: StepCommitted) -> None:
        seconds = event.queue_seconds, event.compute_seconds, event.commit_seconds
        self._rate.add(event.tokens, *seconds)
        self._steps[event.outcome] += 1
        self._tokens += event.tokens
        self._newest_step = event
        for histogram, value in zip(self._phases, seconds, strict=True):
            histogram.add(value)

    def recent(self) -> Recent:
        """Return the figures of the steps of the last minute."""
        return self._rate.recent()

    def figures(self, dropped: dict[str, int]) -> RunFigures:
        """Return all figures at one moment. `dropped` has the number of lost events per subscriber."""
        with self._lock:
            return RunFigures(
                recent=self._rate.recent(),
                steps=dict(self._steps),
                tokens=self._tokens,
                newest_step=self._newest_step,
                step_seconds={
                    phase: histogram.figures()
                    for phase, histogram in zip(STEP_PHASES, self._phases, strict=True)
                },
                commit_seconds=self._commits.figures(),
                checkpoint_seconds=self._checkpoints.figures(),
                recovery_seconds=dict(self._recovery),
                calls=dict(self._calls),
                events_dropped=dropped,
            )


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def figures(self) -> HistogramFigures:
        return HistogramFigures(self._bounds, tuple(self._counts), self._total)
