"""OpenTelemetry: one span per call of TrainStep, with a child span per stage of its step.

    TrainStep                      from the request's arrival until its answer is handed to gRPC
    ├── admit                      decode and check the request, and queue it
    ├── queue                      wait for the device
    ├── compute                    compute the step on the device
    ├── commit                     wait until the step is durable
    └── answer                     encode the answer

The parent is the client's span, whose W3C context travels in the call's metadata. Spans are made from the
events after the call has ended, with the times that the events contain.
"""

from __future__ import annotations

from collections import OrderedDict

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from maskwire._version import __version__
from maskwire.v1 import tracing
from maskwire_server.events import CallEnded, Event, StepCommitted

MOST_WAITING = 1024
"""The maximum number of steps kept until their calls end. The calls of the oldest may have ended already."""


class Traces:
    """Subscribes to the server's events and makes OpenTelemetry spans from them."""

    name = "opentelemetry"
    kinds: frozenset[type[Event]] = frozenset({StepCommitted, CallEnded})

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("maskwire_server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._steps: OrderedDict[int, StepCommitted] = OrderedDict()  # by the number of their call

    def receive(self, event: Event) -> None:
        """Keep each step until its call ends, and then make the spans of the call."""
        if isinstance(event, StepCommitted):
            if event.call:
                self._steps[event.call] = event
                if len(self._steps) > MOST_WAITING:
                    self._steps.popitem(last=False)
        elif isinstance(event, CallEnded) and event.method == "TrainStep" and event.call:
            self._trace(event, self._steps.pop(event.call, None))

    def _trace(self, call: CallEnded, step: StepCommitted | None) -> None:
        if call.trace and not _is_sampled(call.trace):
            return
        carrier = {tracing.TRACE_HEADER: call.trace} if call.trace else {}
        ended, began = call.time, call.time - call.seconds
        span = self._tracer.start_span(
            "TrainStep",
            self._propagator.extract(carrier, Context()),
            SpanKind.SERVER,
            {
                "rpc.system": "grpc",
                "rpc.service": "maskwire.v1.TrainingService",
                "rpc.method": call.method,
                "rpc.grpc.status_code": call.code,
                "maskwire.request_id": call.request_id,
            },
            start_time=_nanoseconds(began),
        )
        if not span.is_recording():
            return
        if call.reason:
            span.set_attribute("maskwire.reason", call.reason)
            span.set_status(Status(StatusCode.ERROR, call.reason))
        if step is not None:
            span.set_attributes(
                {
                    "maskwire.run_id": step.run_id,
                    "maskwire.lineage": step.lineage,
                    "maskwire.step": step.step,
                    "maskwire.outcome": step.outcome.name,
                    "maskwire.tokens": step.tokens,
                }
            )
            self._stages(set_span_in_context(span, Context()), step, began, ended)
        span.end(_nanoseconds(ended))

    def _stages(self, parent: Context, step: StepCommitted, began: float, ended: float) -> None:
        """Make a span per stage. Each stage starts when the previous one ends."""
        durable = min(step.time, ended)
        computed = durable - step.commit_seconds
        taken = computed - step.compute_seconds
        queued = max(began, taken - step.queue_seconds)
        at = began
        for name, end in (
            ("admit", queued),
            ("queue", taken),
            ("compute", computed),
            ("commit", durable),
            ("answer", ended),
        ):
            self._tracer.start_span(name, parent, start_time=_nanoseconds(at)).end(_nanoseconds(max(at, end)))
            at = max(at, end)

    def idle(self) -> bool:
        """Return False: no data is pending here, because the exporter buffers spans in its own thread."""
        return False

    def close(self) -> None:
        """Export the remaining spans."""
        tracing.end(self._provider)


def _is_sampled(trace: str) -> bool:
    """The sampled flag of a trace context. True if it cannot be read, so that the sampler decides."""
    try:
        return bool(int(trace[-2:], 16) & 1)
    except ValueError:
        return True


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
