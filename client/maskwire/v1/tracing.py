"""OpenTelemetry traces, for server and client. The packages come with the extra `telemetry`.

Traces are on when the environment says where to send them; without that nothing is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from maskwire._version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""One of these turns traces on, unless OTEL_SDK_DISABLED is true."""
TRACE_HEADER = "traceparent"
"""The key of the W3C trace context in a call's metadata."""
_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def configured() -> bool:
    """Whether the environment says where to send traces."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and any(os.environ.get(name) for name in ENDPOINTS)


def missing() -> str:
    """What to install, if traces are configured and their packages are missing; else empty."""
    try:
        found = all(find_spec(name) is not None for name in _NEEDS)
    except ModuleNotFoundError:
        found = False
    return "" if found else 'traces need OpenTelemetry: pip install "maskwire[telemetry]"'


def program_provider() -> TracerProvider | None:
    """What the program has set up itself, if it has."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    found = trace.get_tracer_provider()
    return found if isinstance(found, TracerProvider) else None


@functools.cache
def exporting_provider(service: str) -> TracerProvider:
    """A provider that exports by OTLP over HTTP, as the standard environment variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or service
    made = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made
