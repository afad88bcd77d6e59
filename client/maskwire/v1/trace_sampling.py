"""Decides which steps are traced, unless the environment does: tracing each short step would be slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

TRACES_PER_SECOND = 10
"""Enough for each step that takes 100 ms or longer."""


class RateLimited(Sampler):
    """Samples at most `rate` traces per second, and after a pause up to `rate` at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._left = rate
        self._at = clock()

    def should_sample(
        self,
        parent_context: Context | None,  # noqa: ARG002
        trace_id: int,  # noqa: ARG002
        name: str,  # noqa: ARG002
        kind: SpanKind | None = None,  # noqa: ARG002
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,  # noqa: ARG002
        trace_state: TraceState | None = None,  # noqa: ARG002
    ) -> SamplingResult:
        """See `opentelemetry.sdk.trace.sampling.Sampler`."""
        with self._lock:
            now = self._clock()
            self._left = min(self._rate, self._left + self._rate * (now - self._at))
            self._at = now
            if self._left < 1:
                return SamplingResult(Decision.DROP)
            self._left -= 1
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        """See `opentelemetry.sdk.trace.sampling.Sampler`."""
        return f"RateLimited{{{self._rate:g} per second}}"


def default_sampler() -> Sampler:
    """Return a sampler that follows the parent's decision, and starts at most TRACES_PER_SECOND."""
    return ParentBased(RateLimited(TRACES_PER_SECOND))
