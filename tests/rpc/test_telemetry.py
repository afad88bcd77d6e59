"""Telemetry of a real server process: scraped, traced, and its files and logs read."""

from __future__ import annotations

import asyncio
import atexit
import gzip
import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import COUNTING, ServerProcess, wait_until

import maskwire
import maskwire.aio
from maskwire.errors import MaskwireError

prometheus_client = pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

TOKEN = "the-token-of-this-test-only"
DESIGN = {
    "maskwire_steps_total": {"outcome"},
    "maskwire_tokens_total": set(),
    "maskwire_step_seconds": {"phase"},
    "maskwire_loss": {"kind"},
    "maskwire_gradient_norm": set(),
    "maskwire_learning_rate": set(),
    "maskwire_queue_length": set(),
    "maskwire_state": {"state"},
    "maskwire_journal_bytes": set(),
    "maskwire_disk_free_bytes": set(),
    "maskwire_commit_seconds": set(),
    "maskwire_checkpoint_seconds": set(),
    "maskwire_checkpoint_bytes": set(),
    "maskwire_last_checkpoint_step": set(),
    "maskwire_recovery_seconds": {"phase"},
    "maskwire_requests_total": {"method", "code", "reason"},
    "maskwire_device_memory_bytes": {"kind"},
    "maskwire_build_info": {"version", "python", "torch", "device"},
}
"""The metrics that dashboards and alerts rely on, and their labels."""


def batch(seed: int, first: int = 10) -> Any:
    ids = np.random.default_rng(seed).integers(10, 200, (2, 8))
    ids[0, 0] = first
    return ids


def counting(folder: Path, **settings: str) -> ServerProcess:
    known = {"model__num_tokens": "257", "model__mask_id": "256"}
    return ServerProcess(folder, [*COUNTING, "0", f"--hold={folder / 'hold'}"], **known, **settings)


def metrics_address(server: ServerProcess) -> str:
    return re.findall(r"metrics on (http://\S+/metrics)", server.log.read_text())[-1]


def scrape(server: ServerProcess) -> str:
    with urllib.request.urlopen(metrics_address(server), timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
    return text


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """By name; the values of the labels in the order of their names."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name][tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    made = counting(
        tmp_path / "a", telemetry__metrics_address=":0", telemetry__tensorboard="true",
        telemetry__log_format="json", serve__token_admin_file=str(token),
    )  # fmt: skip
    yield made.start()
    made.kill()


def use(server: ServerProcess) -> maskwire.results.Status:
    """Train five steps of which one is not finite, save, and be refused twice."""
    with maskwire.connect(server.address, token=TOKEN) as trainer:
        trainer.train_step(batch(4, first=7))
        for seed in range(4):
            trainer.train_step(batch(seed))
        trainer.checkpoint("kept")
        with pytest.raises(MaskwireError):
            trainer.train_step(batch(5, first=8))  # fails before the update
        trainer.eval_loss(batch(1))
        trainer.generate(count=1, length=4)
        status = trainer.status()
    stranger = maskwire.attach(server.address, token=TOKEN + "x", retry_for=1)
    with stranger, pytest.raises(MaskwireError):
        stranger.status()
    wait_until(
        lambda: requests(server)["OK", "Generate", ""], "the stream to be counted, after its last message"
    )
    return status


def requests(server: ServerProcess) -> dict[tuple[str, ...], float]:
    """How many calls have ended, by status code, method and reason."""
    return samples(scrape(server))["maskwire_requests_total"]


def test_prometheus_status_and_event_files_tell_the_same_of_a_server(server: ServerProcess) -> None:
    status = use(server)
    figures, text = status.figures, scrape(server)
    found = samples(text)
    families = {
        family.name + "_total" * (family.type == "counter"): family
        for family in _families(text)
        if family.name.startswith("maskwire_")
    }
    assert DESIGN.keys() <= families.keys()
    for name, labels in DESIGN.items():
        assert families[name].samples, name
        assert {*families[name].samples[0].labels} - {"le"} == labels, name
        assert families[name].documentation, name
    assert found["maskwire_steps_total"] == {
        ("applied",): 4, ("skipped_non_finite",): 1, ("out_of_memory",): 0, ("poison",): 0,
    }  # fmt: skip
    assert found["maskwire_tokens_total"] == {(): 80}
    assert found["maskwire_state"][("serving",)] == 1
    assert sum(found["maskwire_state"].values()) == 1
    assert figures.newest_step is not None
    assert found["maskwire_loss"][("total",)] == figures.newest_step.losses.loss
    assert found["maskwire_last_checkpoint_step"] == {(): 5}
    buckets = found["maskwire_step_seconds_bucket"]
    assert buckets["+Inf", "compute"] == 5 == found["maskwire_step_seconds_count"][("compute",)]
    requests = found["maskwire_requests_total"]
    assert requests["OK", "TrainStep", ""] == 5
    assert requests["INTERNAL", "TrainStep", "INTERNAL"] == 1
    assert requests["UNAUTHENTICATED", "GetStatus", "UNAUTHENTICATED"] >= 1
    assert requests["PERMISSION_DENIED", "Checkpoint", "PERMISSION_DENIED"] == 0, (
        "the first one is an increase"
    )
    assert requests["UNAUTHENTICATED", "other", "UNAUTHENTICATED"] == 0
    assert requests["OK", "Generate", ""] == 1
    assert found["maskwire_computing_seconds"] == {(): 0}
    assert figures.steps == {"APPLIED": 4, "SKIPPED_NON_FINITE": 1}
    assert figures.tokens == found["maskwire_tokens_total"][()]
    assert figures.refused_calls == {"INTERNAL": 1}
    assert figures.recovery_seconds.keys() == {key for (key,) in found["maskwire_recovery_seconds"]}
    assert (figures.newest_step.step, figures.newest_step.outcome.name) == (5, "APPLIED")
    assert figures.events_dropped == {"tensorboard": 0}


def _families(text: str) -> Any:
    from prometheus_client.parser import text_string_to_metric_families

    return text_string_to_metric_families(text)


def test_promtool_accepts_the_exposition(server: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    use(server)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(server), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_curves_continue_after_a_kill_and_a_restore_in_tensorboard_s_own_reader(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    server = counting(tmp_path / "a", telemetry__tensorboard="true").start()
    folder = tmp_path / "a" / "run" / "tensorboard"

    def curve() -> list[tuple[int, float]]:
        found = accumulators.EventAccumulator(str(folder), {"scalars": 0}).Reload()
        if "loss/total" not in found.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in found.Scalars("loss/total")]

    try:
        expected = {}
        with maskwire.connect(server.address, name="job") as trainer:
            for seed in range(3):
                result = trainer.train_step(batch(seed))
                expected[result.step] = result.loss
            trainer.checkpoint("kept")
            for seed in range(3, 6):
                trainer.train_step(batch(seed))
            wait_until(lambda: len(curve()) == 6, "six points")
            server.kill()
            server.start()
        with maskwire.connect(server.address, name="job") as trainer:
            assert trainer.step == 6
            trainer.restore("kept")
            for seed in range(20, 24):
                result = trainer.train_step(batch(seed))
                expected[result.step] = result.loss
        assert server.stop() == 0
    finally:
        server.kill()
    assert [point for point, _ in curve()] == [1, 2, 3, 4, 5, 6, 7]
    assert dict(curve()) == pytest.approx(expected)


def test_json_logs_hold_no_token_and_one_object_per_line(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    server = ServerProcess(
        tmp_path / "a", telemetry__log_format="json", serve__token_admin_file=str(token)
    )  # the command itself, whose --set takes the format before the first line
    server.start()
    try:
        with maskwire.connect(server.address, token=TOKEN) as trainer:
            trainer.train_step([[1, 2, 3]])
            run_id = trainer.run_id
        assert server.stop() == 0
    finally:
        server.kill()
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    named = [line for line in lines if "run_id" in line]
    assert {line["run_id"] for line in named} == {run_id}
    assert named[-1]["step"] == 1
    assert TOKEN not in server.log.read_text()


class Collector:
    """Receives OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        collected = self.spans = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
                    ExportTraceServiceRequest,
                )

                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collected.extend((attributes["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_a_step_is_one_trace_across_client_and_server(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="OpenTelemetry is not installed"
    )
    from maskwire.v1 import tracing

    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    server = counting(tmp_path / "a").start()
    tracing.exporting_provider.cache_clear()
    try:
        with maskwire.connect(server.address) as trainer:
            first = trainer.train_step(batch(1))
            trainer.submit(batch(2)).result()
            with pytest.raises(MaskwireError):
                trainer.train_step(batch(3, first=8))
        asyncio.run(step_of_the_asyncio_client(server.address))
        tracing.exporting_provider("maskwire").shutdown()
        assert server.stop() == 0
    finally:
        server.kill()
        tracing.exporting_provider.cache_clear()
    by_service: dict[str, list[Any]] = defaultdict(list)
    for service, span in collector.spans:
        by_service[service].append(span)
    clients, servers = by_service["maskwire"], by_service["maskwire-server"]
    assert [span.name for span in clients] == ["train_step"] * 4
    assert len({span.trace_id for span in clients}) == 4
    calls = [span for span in servers if span.name == "TrainStep"]
    assert {span.parent_span_id for span in calls} == {span.span_id for span in clients}
    client = next(span for span in clients if _attributes(span).get("maskwire.step") == 1)
    trace = [span for span in servers if span.trace_id == client.trace_id]
    (root,) = [span for span in trace if span.name == "TrainStep"]
    assert root.parent_span_id == client.span_id
    assert _attributes(root)["maskwire.step"] == first.step == 1
    stages = sorted((span for span in trace if span is not root), key=lambda span: span.start_time_unix_nano)
    assert {span.name for span in stages} == {"admit", "queue", "compute", "commit", "answer"}
    assert {span.parent_span_id for span in stages} == {root.span_id}
    ordered = {span.name: span for span in stages}
    names = ["admit", "queue", "compute", "commit", "answer"]
    for before, after in itertools.pairwise(names):
        assert ordered[before].end_time_unix_nano == ordered[after].start_time_unix_nano
    assert ordered["admit"].start_time_unix_nano == root.start_time_unix_nano
    assert ordered["answer"].end_time_unix_nano == root.end_time_unix_nano
    metrics = first.metrics
    seconds = (ordered["compute"].end_time_unix_nano - ordered["compute"].start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(metrics.compute_seconds, abs=1e-5)
    (failed,) = [span for span in servers if _attributes(span).get("maskwire.reason")]
    assert _attributes(failed)["maskwire.reason"] == "INTERNAL"
    assert sum(span.trace_id == failed.trace_id for span in clients) == 1


async def step_of_the_asyncio_client(address: str) -> None:
    async with await maskwire.aio.connect(address) as trainer:
        await trainer.train_step(batch(9))


def _attributes(span: Any) -> dict[str, Any]:
    return {item.key: item.value.int_value or item.value.string_value for item in span.attributes}


def test_a_collector_that_does_not_answer_holds_up_neither_steps_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="OpenTelemetry is not installed"
    )
    from maskwire.v1 import tracing

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setenv(tracing.ENDPOINTS[1], f"http://127.0.0.1:{silent.getsockname()[1]}")
        server = counting(tmp_path / "a").start()
        tracing.exporting_provider.cache_clear()
        try:
            with maskwire.connect(server.address) as trainer:
                for seed in range(5):
                    trainer.train_step(batch(seed))
            provider = tracing.exporting_provider("maskwire")
            tracing.end(provider, seconds=0.1)
            assert "maskwire-traces" in {thread.name for thread in threading.enumerate()}, "it still waits"
            server.process.terminate()
            assert server.process.wait(60) == 0
        finally:
            server.kill()
            atexit.unregister(tracing.end)
            tracing.exporting_provider.cache_clear()


def test_steps_beyond_the_rate_are_not_traced_and_the_server_follows_the_client() -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.sdk.trace.sampling import ParentBased

    from maskwire.step_spans import StepSpans
    from maskwire.v1.trace_sampling import RateLimited
    from maskwire_server.events import CallEnded
    from maskwire_server.telemetry.traces import Traces

    now = [0.0]
    exporter = InMemorySpanExporter()
    provider = TracerProvider(ParentBased(RateLimited(2, lambda: now[0])), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = StepSpans(provider.get_tracer("test"), "there")
    traces = Traces(provider)
    sampled = []
    for number in range(8):
        now[0] = number * 0.25
        span = spans.begin()
        ((key, header),) = span.headers
        assert key == "traceparent"
        sampled.append(int(header[-2:], 16) % 2 == 1)
        traces.receive(CallEnded(10.0, "TrainStep", "OK", "", 1.0, "", number + 1, header))
        span.end(number)
    assert sampled == [True, True, True, False, True, False, True, False], "2 at once, then 2 per second"
    names = [span.name for span in exporter.get_finished_spans()]
    assert (names.count("train_step"), names.count("TrainStep")) == (5, 5)
    traces.receive(CallEnded(10.0, "TrainStep", "OK", "", 1.0, "", 98, "x" * 55))
    traces.receive(CallEnded(10.0, "TrainStep", "OK", "", 1.0, "", 99, ""))  # of a client that does not trace
    assert len(exporter.get_finished_spans()) == 10, "the server's own limit applies"


def test_without_an_endpoint_no_step_is_traced_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskwire import step_spans
    from maskwire.v1 import tracing

    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracing, "program_provider", lambda: None)
    assert step_spans.step_spans("127.0.0.1:1") is None
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert step_spans.step_spans("127.0.0.1:1") is None


def test_a_metrics_address_in_use_is_refused_with_what_to_do(tmp_path: Path, server: ServerProcess) -> None:
    taken = metrics_address(server).removeprefix("http://").removesuffix("/metrics")
    other = counting(tmp_path / "b", telemetry__metrics_address=taken)
    with pytest.raises(AssertionError) as found:
        other.start()
    assert other.process.wait(60) == 2
    assert f"telemetry.metrics_address: cannot listen on '{taken}'" in str(found.value)
    other.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_prometheus_scrapes_the_server_and_fires_for_a_low_disk_and_for_no_steps(
    tmp_path: Path, small_disk: Path
) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("Prometheus is not installed (Debian: prometheus)")
    rules = (Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(re.sub(r"\n +for: \S+", "", rules))  # at once, not after minutes
    server = counting(small_disk / "a", telemetry__metrics_address=":0").start()
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(batch(1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = metrics_address(server).removeprefix("http://").removesuffix("/metrics")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [alerts.yml]\n"
        f"scrape_configs: [{{job_name: maskwire, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with (tmp_path / "prometheus.log").open("w") as log:
        watching = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'db'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
        )

    def query(expression: str) -> dict[str, float]:
        """Values by the alert's name, or by nothing."""
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.loads(answer.read())["data"]["result"]
        except OSError:  # it is not up yet
            return {}
        return {each["metric"].get("alertname", ""): float(each["value"][1]) for each in found}

    try:
        wait_until(lambda: query("maskwire_tokens_total") == {"": 16}, "a scrape")
        expected = {"MaskwireDiskLow": 1, "MaskwireNoSteps": 1}
        wait_until(lambda: query('ALERTS{alertstate="firing"}') == expected, "two alerts")
    finally:
        watching.kill()
        watching.wait()
        server.kill()
