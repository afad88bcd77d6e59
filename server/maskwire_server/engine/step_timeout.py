"""How long a training step may take before it counts as hung."""

from __future__ import annotations

import statistics
from collections import deque

LEAST_SECONDS = 600.0
"""The shortest default limit, and the shortest limit for work that may have to compile kernels first: the
first step of each batch shape, an evaluation, a generation, a copy for a checkpoint."""
_MEDIANS = 20
_STEPS = 100
_SHAPES = 4096  # the most shapes that are remembered; after that, every shape counts as computed before


class StepTimeout:
    """The time after which a training step counts as hung: `serve.step_timeout_seconds`.

    The default is 20 times the median duration of the last 100 steps, but at least 600 s.
    """

    def __init__(self, configured: float | None) -> None:
        self._configured = configured
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._by_median = 0.0  # computed only where it may exceed LEAST_SECONDS: short steps pay nothing
        self._shapes: set[tuple[int, int]] = set()

    @property
    def seconds(self) -> float:
        """The limit in seconds for a step whose batch shape was computed before."""
        if self._configured is not None:
            return self._configured
        return max(LEAST_SECONDS, self._by_median)

    @property
    def unknown_seconds(self) -> float:
        """The limit in seconds for work that this process may be doing for the first time."""
        return max(self.seconds, LEAST_SECONDS)

    def of_shape(self, shape: tuple[int, int]) -> float:
        """The limit in seconds for a step on a batch of shape [rows, columns]."""
        known = shape in self._shapes or len(self._shapes) >= _SHAPES
        return self.seconds if known else self.unknown_seconds

    def add(self, shape: tuple[int, int], seconds: float) -> None:
        """Record the batch shape and the duration in seconds of a computed step."""
        self._seconds.append(seconds)
        if max(self._by_median, _MEDIANS * seconds) > LEAST_SECONDS:
            self._by_median = _MEDIANS * statistics.median(self._seconds)
        if len(self._shapes) < _SHAPES:
            self._shapes.add(shape)
