"""The HTTP endpoint for Prometheus. A scrape reads the status; nothing is computed between scrapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from maskwire_server.errors import ConfigError
from maskwire_server.run_figures import HistogramFigures
from maskwire_server.telemetry.metrics import METRICS, Metric, Reading

log = logging.getLogger(__name__)


class RunCollector(Collector):
    """Reads all metrics of a run at each scrape."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    def describe(self) -> Iterator[Family]:
        """Yield the names and types of the metrics, without values."""
        for metric in METRICS:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        """Yield all metrics, with their values at one moment."""
        reading = self._read()
        for metric in METRICS:
            family = _family(metric)
            for labels, value in metric.read(reading):
                if isinstance(family, HistogramMetricFamily):
                    assert isinstance(value, HistogramFigures)
                    family.add_metric(labels, _buckets(value), value.total)
                elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
                    assert not isinstance(value, HistogramFigures)
                    family.add_metric(labels, float(value))
            yield family


def _family(metric: Metric) -> Family:
    kinds: dict[str, Callable[..., Family]] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)


def _buckets(value: HistogramFigures) -> list[tuple[str, float]]:
    """The upper bound and cumulative count of each bucket, as Prometheus expects them."""
    buckets, below = [], 0
    for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(below)))
    return buckets


def serve_metrics(address: str, read: Callable[[], Reading]) -> None:
    """Serve GET /metrics on an address until the process ends. Raises ConfigError if it cannot listen."""
    registry = CollectorRegistry()
    registry.register(RunCollector(read))
    ProcessCollector(registry=registry)
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ConfigError(
            f"telemetry.metrics_address: cannot listen on {address!r} ({error.strerror or error}): "
            "choose another address, or port 0 for a free port"
        ) from None
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)
