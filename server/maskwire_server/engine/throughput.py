"""Measures the run's throughput."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from maskwire_server.run_figures import Recent


@dataclass(slots=True)
class _Second:
    """The sums over the steps that became durable within one second."""

    second: int
    steps: int = 0
    tokens: int = 0
    queue: float = 0.0
    compute: float = 0.0
    commit: float = 0.0


class Rate:
    """Measures steps and tokens per second, and the mean times of a step, over the last `seconds`.

    It keeps one record per second, which bounds its memory.
    """

    def __init__(self, seconds: int, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._counts: deque[_Second] = deque(maxlen=seconds + 1)

    def add(self, tokens: int, queue: float = 0.0, compute: float = 0.0, commit: float = 0.0) -> None:
        """Count a step that became durable, its tokens, and its times in seconds."""
        second = int(self._clock())
        if not self._counts or self._counts[-1].second != second:
            self._counts.append(_Second(second))
        last = self._counts[-1]
        last.steps += 1
        last.tokens += tokens
        last.queue += queue
        last.compute += compute
        last.commit += commit

    def recent(self) -> Recent:
        """The speed and the mean times over the last `seconds`. Can be called from any thread."""
        now = self._clock()
        counts = [count for count in self._counts.copy() if count.second >= now - self._seconds]
        span = max(min(self._seconds, now - self._began), 1e-9)
        steps = sum(count.steps for count in counts)
        return Recent(
            steps / span,
            sum(count.tokens for count in counts) / span,
            sum(count.queue for count in counts) / steps if steps else None,
            sum(count.compute for count in counts) / steps if steps else None,
            sum(count.commit for count in counts) / steps if steps else None,
        )
