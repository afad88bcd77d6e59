"""P10 and R11, on one GPU and within a time limit: python -m bench --gpu --out DIR.

Everything that computes runs in its own process, which can be killed, so that a part that hangs, or that is
too slow on this machine, loses its own rows and no others. P10's processes take turns on the
device: the trainer by itself, x-transformers, and a server with a client.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import maskwire
from bench.gpu_kills import Server, resume
from bench.gpu_worker import REPLY, Size
from bench.harness import Row, cores, in_flight_steps, module, ratio
from bench.peer import step_flops

SECONDS = 340.0  # of the 6 minutes; the rest is for the imports before and the picture after
SHARE = 0.62  # of these seconds, which P10 may take


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    size: Size
    rounds: int
    steps: int
    products: int
    kills: int
    lanes: int
    """How many servers are killed side by side."""
    bad_tokens: int


def plan(device: str, quick: bool) -> Plan:
    """The full measurement, or a trial of the same code in a few seconds."""
    if quick:
        size = Size(4, 16, 64, 2, 1, 257, device, "fp32" if device == "cpu" else "bf16", "off", 256)
        return Plan(size, rounds=2, steps=2, products=4, kills=1, lanes=1, bad_tokens=20)
    size = Size(512, 256, 768, 12, 12, 8193, device, "bf16", "default", 8192)
    lanes = max(1, min(10, cores() // 2 - 1))
    return Plan(size, rounds=5, steps=8, products=60, kills=50, lanes=lanes, bad_tokens=1000)


def measure(device: str, quick: bool, seconds: float = SECONDS) -> tuple[list[Row], dict[str, str]]:
    """The rows, each with a figure or a note why it has none, and the device and versions."""
    chosen = plan(device, quick)
    began = time.monotonic()
    about: dict[str, str] = {}
    rows = Rows(chosen)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        room = Path(folder)
        try:
            about = training(chosen, rows, room, began + SHARE * seconds)
        except Exception as error:
            rows.stopped = one_line(error)
            tell(f"P10 ended early: {rows.stopped}")
        tell(f"P10 took {time.monotonic() - began:.0f} s")
        found = [*rows.rows(), *resume(chosen, room, began + seconds - 5, tell)]
    tell(f"in all {time.monotonic() - began:.0f} s")
    return found, about


def tell(line: str) -> None:
    """Print progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error as text for a table's cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].replace("|", "/")


class Rows:
    """What P10 has measured so far: a part that runs out of time does not lose earlier figures."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.products: list[float] = []
        self.ours: list[dict[str, float]] = []
        self.peer: list[dict[str, float]] = []
        self.served: list[float] = []
        self.compiled = self.peer_compiled = ""
        self.parts = self.peer_parts = 1
        self.peer_note = self.served_note = self.stopped = ""

    def rows(self) -> list[Row]:
        """The rows of P10."""
        size = self._plan.size
        what = (
            f"{size.precision}, {size.depth} × {size.dim}, rows of {size.columns}, batch {size.rows}, "
            f"vocabulary {size.tokens:,}"
        )
        flops = Row("P10", f"model FLOP/s of a step ÷ large bf16 products, {what}", "≥ 0.5", None)
        served = Row("P10", f"served ÷ in-process steps per second, durable, {what}", "≥ 0.99", None)
        peer = Row("P10", f"tokens per second trained ÷ x-transformers', {what}", "≥ 1.3", None)
        alone = [found["steps_per_second"] for found in self.ours]
        tokens = size.rows * size.columns
        if alone and self.products:
            done = [
                found["steps_per_second"]
                * step_flops(size.rows, size.columns, size.dim, size.depth, size.heads, size.tokens,
                             found["masked"])
                for found in self.ours
            ]  # fmt: skip
            pairs = min(len(done), len(self.products))
            ratio(flops, done[:pairs], self.products[:pairs], at_least=0.5)
            flops.parts = {
                "TFLOP/s": median(done) / 1e12, "TFLOP/s, products": median(self.products) / 1e12,
                "peak GiB": max(found["peak_gib"] for found in self.ours), "parts": self.parts,
            }  # fmt: skip
            flops.note = self.compiled
        if alone and self.served:
            ratio(served, self.served, [median(alone)] * len(self.served), at_least=0.99)
            served.parts = {
                "ms a step, alone": 1e3 / median(alone),
                "ms a step, served": 1e3 / median(self.served),
            }
        if alone and self.peer:
            theirs = [found["steps_per_second"] for found in self.peer]
            ratio(peer, alone[1 : len(theirs) + 1], theirs, at_least=1.3)  # the first preceded the rounds
            peer.parts = {
                "tokens/s": median(alone) * tokens, "tokens/s, x-transformers": median(theirs) * tokens,
                "peak GiB, x-transformers": max(found["peak_gib"] for found in self.peer),
                "parts, x-transformers": self.peer_parts,
            }  # fmt: skip
            peer.note = self.peer_compiled
        for row, note in ((flops, ""), (served, self.served_note), (peer, self.peer_note)):
            if row.value is None:
                row.note = f"not measured: {note or self.stopped or 'the time was over'}"
        return [flops, served, peer]


class Worker:
    """A `bench.gpu_worker` process."""

    def __init__(self, arm: str, size: Size, room: Path) -> None:
        self._log = room / f"{arm}.log"
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                module("gpu_worker", json.dumps({"arm": arm, **dataclasses.asdict(size)})),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(REPLY):
                self._replies.put(line.removeprefix(REPLY))
        self._replies.put(None)

    def reply(self, deadline: float) -> dict[str, Any]:
        """The next reply. Raises TimeoutError, or RuntimeError with the end of the process's output."""
        try:
            line = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("the time was over") from None
        found: dict[str, Any] = {"error": self._log.read_text()[-300:]} if line is None else json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def ask(self, what: str, count: int, deadline: float) -> dict[str, Any]:
        """Send a command and wait for its reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "count": count}) + "\n")
        self._process.stdin.flush()
        return self.reply(deadline)

    def end(self) -> None:
        """Kill it: it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def training(plan: Plan, rows: Rows, room: Path, deadline: float) -> dict[str, str]:
    """Measure P10 into `rows`. Returns the device's name and torch's version."""
    workers: list[Worker] = []
    server: Server | None = None
    with_peer = importlib.util.find_spec("x_transformers") is not None
    try:
        ours = Worker("ours", plan.size, room)
        workers.append(ours)
        about = {name: str(value) for name, value in ours.reply(deadline).items() if value}
        tell(f"P10 on {about['device']}: the trainer by itself …")
        found = ours.ask("warm", 2, deadline)
        rows.parts, rows.compiled = found["parts"], found["why"]
        tell(f"  compiled and warm in {found['seconds']:.0f} s, {found['parts']} parts")
        size = dataclasses.replace(plan.size, compile=found["compile"], parts=found["parts"])
        step(plan, rows, ours, deadline)
        server = Server(room / "served", flat(size.settings()))
        server.spawn()  # it starts while x-transformers compiles
        peer = None
        if with_peer:
            try:
                peer = warm_peer(size, rows, room, deadline - 0.4 * (deadline - time.monotonic()), workers)
            except Exception as error:
                rows.peer_note = f"x-transformers: {one_line(error)}"
                tell(f"  {rows.peer_note}")
                for worker in workers[1:]:  # it may still be computing
                    worker.end()
        else:
            rows.peer_note = 'pip install "maskwire[bench]"'
        try:
            serve(plan, rows, server, size, deadline)
        except Exception as error:
            rows.served_note = one_line(error)
            tell(f"  served: {rows.served_note}")
        server.kill()
        for number in range(plan.rounds):
            tell(f"  round {number + 1} of {plan.rounds}")
            step(plan, rows, ours, deadline)
            if peer is not None:
                try:
                    rows.peer.append(peer.ask("steps", plan.steps, deadline))
                except RuntimeError as error:
                    rows.peer_note, peer = f"x-transformers: {one_line(error)}", None
        return about
    finally:
        if server is not None:
            server.kill()
        for worker in workers:
            worker.end()


def step(plan: Plan, rows: Rows, ours: Worker, deadline: float) -> None:
    """One round of maskwire's trainer: matrix products, then steps."""
    product = ours.ask("products", plan.products, deadline)["flops"]
    rows.ours.append(ours.ask("steps", plan.steps, deadline))
    rows.products.append(product)


def warm_peer(size: Size, rows: Rows, room: Path, deadline: float, workers: list[Worker]) -> Worker:
    """Start x-transformers, compile it and warm it up."""
    tell("  x-transformers …")
    peer = Worker("x-transformers", size, room)
    workers.append(peer)
    peer.reply(deadline)
    found = peer.ask("warm", 2, deadline)
    rows.peer_parts = found["parts"]
    rows.peer_compiled = f"x-transformers {found['why']}" if found["why"] else ""
    tell(f"  compiled and warm in {found['seconds']:.0f} s, {found['parts']} parts")
    return peer


def serve(plan: Plan, rows: Rows, server: Server, size: Size, deadline: float) -> None:
    """Measure steps through the server, with the full window in flight."""
    tell("  the server …")
    address = server.ready(deadline)
    ids = np.random.default_rng(0).integers(0, size.tokens - 1, (size.rows, size.columns))
    left = max(1.0, deadline - time.monotonic())
    with maskwire.connect(address, window=4, retry_for=10, on_wait=tell) as trainer:
        over = threading.Timer(left, server.kill)  # kills the server if a step hangs
        over.daemon = True
        over.start()
        in_flight_steps(trainer, ids, 3)
        for _ in range(plan.rounds):
            rows.served.append(in_flight_steps(trainer, ids, plan.steps))
            if time.monotonic() > deadline:
                break
        over.cancel()


def flat(settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The settings by SECTION.KEY."""
    return {
        f"{section}.{key}": str(value) for section, keys in settings.items() for key, value in keys.items()
    }


def write(
    rows: list[Row], about: dict[str, str], out: Path, picture: Callable[[list[Row], Path], None]
) -> None:
    """Write gpu.json and, if it can be drawn, gpu.png."""
    found = {"machine": about, "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "gpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    try:
        picture(rows, out / "gpu.png")
    except Exception as error:  # the figures are written; they must not be lost for a picture
        tell(f"no picture: {one_line(error)}")
