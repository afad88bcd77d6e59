"""Telemetry: Prometheus metrics, TensorBoard event files, OpenTelemetry traces and JSON logs of a run.

The modules subscribe to events and read the run's status; they do not depend on the engine. They need the
packages of the extra `telemetry`, which are imported only if a setting requires them.
"""
