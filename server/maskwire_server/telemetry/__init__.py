"""Telemetry: Prometheus metrics, TensorBoard event files, OpenTelemetry traces and JSON logs of a run.

Its modules subscribe to events and read the status; they do not depend on the engine. The packages that they
need come with the extra `telemetry`, and are imported when a setting asks for them.
"""
