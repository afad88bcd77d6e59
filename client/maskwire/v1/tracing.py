"""OpenTelemetry traces of server and client. The extra `telemetry` installs the packages.

Traces are on if an environment variable names the endpoint to send them to; otherwise OpenTelemetry is not
imported. The client also uses a tracer provider that the program itself has set up.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING

from maskwire._version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Environment variables: any of these turns traces on, unless OTEL_SDK_DISABLED is true."""
TRACE_HEADER = "traceparent"
"""The key of the W3C trace context in a call's metadata."""
EXIT_SECONDS = 2.0
_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def configured() -> bool:
    """Whether an environment variable names an endpoint for traces, and traces are not disabled."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and any(os.environ.get(name) for name in ENDPOINTS)


def missing() -> str:
    """Return a message that says what to install if packages for traces are missing; otherwise empty."""
    try:
        found = all(find_spec(name) is not None for name in _NEEDS)
    except ModuleNotFoundError:
        found = False
    return "" if found else 'traces need OpenTelemetry: pip install "maskwire[telemetry]"'


def program_provider() -> TracerProvider | None:
    """Return the tracer provider that the program itself has set up; None if there is none."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    found = trace.get_tracer_provider()
    return found if isinstance(found, TracerProvider) else None


@functools.cache
def exporting_provider(service: str) -> TracerProvider:
    """Return a tracer provider that exports traces by OTLP over HTTP.

    OpenTelemetry's standard environment variables configure it. Unless OTEL_TRACES_SAMPLER is set, it starts
    at most TRACES_PER_SECOND traces per second. `service` is the service's name if OTEL_SERVICE_NAME is not
    set.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from maskwire.v1.trace_sampling import default_sampler

    name = os.environ.get("OTEL_SERVICE_NAME") or service
    made = TracerProvider(
        sampler=None if os.environ.get("OTEL_TRACES_SAMPLER") else default_sampler(),
        resource=Resource.create({"service.name": name, "service.version": __version__}),
        shutdown_on_exit=False,
    )
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    atexit.register(end, made)
    return made


def end(provider: TracerProvider, seconds: float = EXIT_SECONDS) -> None:
    """Send the remaining spans, for at most `seconds`, so that a slow collector does not delay an exit."""
    ending = threading.Thread(target=provider.shutdown, name="maskwire-traces", daemon=True)
    ending.start()
    ending.join(seconds)
