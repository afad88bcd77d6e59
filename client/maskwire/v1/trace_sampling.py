"""The default sampler of traces. It limits their rate, because tracing every short step would be slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

TRACES_PER_SECOND = 10
"""The most traces per second: enough to trace every step that takes 100 ms or longer."""


class RateLimited(Sampler):
    """A sampler that keeps at most `rate` traces per second, or up to `rate` at once after a pause."""

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
        """Keep the trace if the rate allows it, otherwise drop it. Part of OpenTelemetry's `Sampler`."""
        with self._lock:
            now = self._clock()
            self._left = min(self._rate, self._left + self._rate * (now - self._at))
            self._at = now
            if self._left < 1:
                return SamplingResult(Decision.DROP)
            self._left -= 1
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        """Return the sampler's name and rate. Part of OpenTelemetry's `Sampler`."""
        return f"RateLimited{{{self._rate:g} per second}}"


def default_sampler() -> Sampler:
    """Return a sampler that follows the parent span, and starts at most TRACES_PER_SECOND traces itself."""
    return ParentBased(RateLimited(TRACES_PER_SECOND))
