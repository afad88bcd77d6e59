"""How fast the run goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Rate:
    """Steps and tokens per second over the last `seconds`."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._steps: deque[tuple[float, int]] = deque(maxlen=100_000)

    def add(self, tokens: int) -> None:
        """A step became durable."""
        now = self._clock()
        self._steps.append((now, tokens))
        while self._steps[0][0] < now - self._seconds:
            self._steps.popleft()

    def per_second(self) -> tuple[float, float]:
        """(steps, tokens) per second; safe from any thread."""
        now = self._clock()
        recent = [tokens for at, tokens in self._steps.copy() if at >= now - self._seconds]
        span = max(min(self._seconds, now - self._began), 1e-9)
        return len(recent) / span, sum(recent) / span
