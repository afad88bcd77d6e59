"""The run's throughput."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Rate:
    """Steps and tokens per second over the last `seconds`. One counter per second bounds its size."""

    def __init__(self, seconds: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._counts: deque[tuple[int, int, int]] = deque(maxlen=seconds + 1)  # second, steps, tokens

    def add(self, tokens: int) -> None:
        """Count a step that became durable."""
        second = int(self._clock())
        if self._counts and self._counts[-1][0] == second:
            _, steps, others = self._counts[-1]
            self._counts[-1] = (second, steps + 1, others + tokens)
        else:
            self._counts.append((second, 1, tokens))

    def per_second(self) -> tuple[float, float]:
        """(steps, tokens) per second; safe from any thread."""
        now = self._clock()
        recent = [count for count in self._counts.copy() if count[0] >= now - self._seconds]
        span = max(min(self._seconds, now - self._began), 1e-9)
        return sum(steps for _, steps, _ in recent) / span, sum(tokens for _, _, tokens in recent) / span
