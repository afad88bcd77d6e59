"""P13: the cost of all telemetry, on compared with off: the server's CPU per step, and a step's latency.

On means: metrics that are scraped, event files, traces of client and server to a collector, and a JSON log.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

import maskwire
from bench.harness import Row, module, process, seconds_of
from bench.serving import BATCH
from bench.training import MODEL, SERVER, SIZES
from maskwire.v1 import tracing

ON = ("telemetry.metrics_address=:0", "telemetry.tensorboard=true", "telemetry.log_format=json")
LEVEL = 0.95


def measure(quick: bool) -> list[Row]:
    """The rows of P13."""
    pairs = 5 if quick else 30
    rows, columns, _ = SIZES["100 ms"]
    # Half the rows on one thread take as long; several threads spin while they wait, which costs CPU time.
    ids = np.random.default_rng(0).integers(0, 256, (rows // 2, columns))
    with tempfile.TemporaryDirectory() as folder, collector() as endpoint:
        room = Path(folder)
        settings = [
            f"--set={setting}" for setting in (*MODEL, "serve.threads=1", "serve.address=127.0.0.1:0")
        ]
        with (
            server(room / "off", [SERVER, "serve", *settings], ()) as off,
            server(room / "on", [SERVER, "serve", *settings], ON, endpoint) as on,
        ):
            cpu = in_pairs(pairs, lambda each: each.cpu_per_step(ids, 10), on, off)
        null = module("null_server")
        with (
            server(room / "null off", null, ()) as off,
            server(room / "null on", null, ON, endpoint) as on,
        ):
            latency = in_pairs(pairs, lambda each: each.latency(40), on, off)
    return [
        row("CPU seconds of the server per step of 100 ms, all telemetry on ÷ off", 1.02, cpu),
        row("latency of a durable step that computes nothing, 64 KiB, all telemetry on ÷ off", 1.1, latency),
    ]


def row(what: str, at_most: float, pairs: list[tuple[float, float]]) -> Row:
    """The median of the pairs' ratios, and its bootstrap interval."""
    ratios = np.array([on / off for on, off in pairs])
    low, high = interval(ratios)
    return Row(
        "P13", what, f"≤ {at_most}", float(np.median(ratios)), low, high, bool(np.median(ratios) <= at_most),
        note=f"median of {len(pairs)} pairs; spread: its {LEVEL:.0%} interval",
        parts={"on ms": 1e3 * median(on for on, _ in pairs), "off ms": 1e3 * median(off for _, off in pairs)},
    )  # fmt: skip


def interval(values: npt.NDArray[np.float64], draws: int = 10_000) -> tuple[float, float]:
    """The bootstrap interval of the median."""
    again = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.quantile(np.median(again, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Measured:
    """A server, and a client that trains on it."""

    def __init__(self, trainer: maskwire.Trainer, pid: int, metrics: str | None) -> None:
        self._trainer = trainer
        self._clock = (~pid << 3) | 2  # Linux: the CPU clock of a process, see clock_getcpuclockid(3)
        self._metrics = metrics

    def cpu_per_step(self, ids: npt.NDArray[np.int64], steps: int) -> float:
        """CPU seconds of the server per step, one scrape included."""
        began = time.clock_gettime(self._clock)
        for _ in range(steps):
            self._trainer.train_step(ids)
        if self._metrics is not None:
            urllib.request.urlopen(self._metrics, timeout=30).read()
        return (time.clock_gettime(self._clock) - began) / steps

    def latency(self, steps: int) -> float:
        """Seconds of a step, one at a time."""
        return seconds_of(lambda: self._trainer.train_step(BATCH), steps)


def in_pairs(
    count: int, act: Callable[[Measured], float], on: Measured, off: Measured
) -> list[tuple[float, float]]:
    """On and off in turn; which comes first alternates. The first pair warms up and does not count."""
    found = []
    for number in range(count + 1):
        first, second = (on, off) if number % 2 else (off, on)
        values = act(first), act(second)
        found.append(values if number % 2 else values[::-1])
    return found[1:]


@contextlib.contextmanager
def server(
    folder: Path, command: list[str], settings: tuple[str, ...], endpoint: str | None = None
) -> Iterator[Measured]:
    """A server with these settings; with an endpoint, it and its client export traces there."""
    folder.mkdir()
    log, run_dir = folder / "log", folder / "run"
    flags = [f"--set={setting}" for setting in settings]
    own = [f"--run-dir={run_dir}"] if command[0] == SERVER else [str(run_dir)]
    with (
        environment(endpoint),
        process(*command, *own, *flags, log=log) as target,
        maskwire.connect(target) as trainer,
    ):
        found = re.findall(r"http://\S+/metrics", log.read_text())
        yield Measured(trainer, int((run_dir / "lock").read_text()), found[0] if found else None)


@contextlib.contextmanager
def environment(endpoint: str | None) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in tracing.ENDPOINTS}
    if endpoint is not None:
        os.environ[tracing.ENDPOINTS[0]] = f"{endpoint}/v1/traces"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Accepts traces over OTLP and drops them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()
