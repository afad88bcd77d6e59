"""The section [telemetry] of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from maskwire_server.config.base import Section


class TelemetryConfig(Section):
    """[telemetry]: metrics, event files and logs (docs/monitoring.md). Can be changed at a restart.

    Traces are turned on by the environment variables of OpenTelemetry.
    """

    metrics_address: str | None = None
    """HOST:PORT for Prometheus to scrape, over HTTP without access control (port 0: any free port). :PORT
    listens on loopback; for another address write the host. Default: no metrics are served."""
    tensorboard: bool = False
    """Write event files for TensorBoard to the folder `tensorboard` of the run directory: losses,
    evaluations, and generated samples as text."""
    log_format: Literal["text", "json"] = "text"
    """json: one JSON object per line, with run id, step and request id."""

    @field_validator("metrics_address")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host, colon, port = value.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"must be HOST:PORT or :PORT with a port of 0 to 65535, got {value!r}")
        return f"{host or '127.0.0.1'}:{port}"
