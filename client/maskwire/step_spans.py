"""OpenTelemetry spans, one for each training step. The span's context is sent to the server."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from maskwire.v1 import tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)


class StepSpan:
    """The OpenTelemetry span of one training step, from its submission to its acknowledgement."""

    def __init__(self, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._span = span
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        self.headers = tuple((key, value) for key, value in carrier.items() if key == tracing.TRACE_HEADER)
        """The entries to add to the gRPC metadata of the step's calls."""

    def end(self, step: int) -> None:
        """End the span of an acknowledged step, and record the step's number in it."""
        self._span.set_attribute("maskwire.step", step)
        self._span.end()

    def fail(self, reason: str) -> None:
        """End the span with an error status, because the step was refused or was not sent."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()


class StepSpans:
    """Starts the spans of training steps, as children of the program's current span if there is one."""

    def __init__(self, tracer: Tracer, target: str) -> None:
        self._tracer = tracer
        self._target = target

    def begin(self) -> StepSpan:
        """Start and return the span of a step that is being submitted."""
        from opentelemetry.trace import SpanKind

        attributes = {"rpc.system": "grpc", "rpc.method": "TrainStep", "server.address": self._target}
        return StepSpan(self._tracer.start_span("train_step", kind=SpanKind.CLIENT, attributes=attributes))


def step_spans(target: str) -> StepSpans | None:
    """Return a StepSpans for a server; None if neither program nor environment configures OpenTelemetry."""
    provider = tracing.program_provider()
    if provider is None and tracing.configured():
        if missing := tracing.missing():
            log.warning("%s; no step is traced", missing)
        else:
            provider = tracing.exporting_provider("maskwire")
    return None if provider is None else StepSpans(provider.get_tracer("maskwire"), target)
