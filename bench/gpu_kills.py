"""R11: servers on the device that are killed and started again, and one that receives bad tokens.

Several servers train the same run side by side, because most of a restart is the time of imports. One of
them is not killed; it receives requests with bad tokens while it trains. All must end with equal weights,
optimizer state and digest.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import grpc
import numpy as np

import maskwire
from bench.harness import READY, Row
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from bench.gpu import Plan

STEPS_PER_KILL, LEAST_STEPS = 8, 24
ROWS, COLUMNS, SAVE_EVERY = 16, 128, 10
WINDOW = 4


class Server:
    """A `maskwire-server` process on a run directory, at a Unix socket that restarts do not change."""

    every: ClassVar[weakref.WeakSet[Server]] = weakref.WeakSet()
    """All servers that were made."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.every.add(self)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder / "log"
        self.address = f"unix:{folder / 'socket'}"
        flags = {
            "run.dir": str(folder / "run"), "serve.address": "127.0.0.1:0",
            "serve.socket": str(folder / "socket"), **settings,
        }  # fmt: skip
        self._command = [sys.executable, "-m", "maskwire_server", "serve"]
        self._command += [f"--set={key}={value}" for key, value in flags.items()]
        self._process: subprocess.Popen[str] | None = None
        self._over = False
        self._lock = threading.Lock()

    def spawn(self) -> None:
        """Start it, without waiting. RuntimeError after `end`."""
        with self._lock, self.log.open("a") as log:
            if self._over:
                raise RuntimeError("the time was over")
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)

    def ready(self, deadline: float) -> str:
        """Wait until it serves, and return its TCP address; kill it at the deadline."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        over = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
        over.daemon = True
        over.start()
        line = process.stdout.readline()
        over.cancel()
        if READY not in line:
            if time.monotonic() >= deadline:
                raise TimeoutError("the time was over while the server started")
            raise RuntimeError(f"the server ended with {process.wait(10)}: {self.log.read_text()[-300:]}")
        return line.partition(READY)[2].strip()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def end(self) -> None:
        """Kill it and do not let it start again."""
        with self._lock:
            self._over = True
        self.kill()


class Lane:
    """One run, which a thread trains to its end, and whose server is killed after some of the steps."""

    def __init__(
        self, plan: Plan, folder: Path, number: int, kills: int, steps: int, deadline: float, token: str = ""
    ) -> None:
        settings = {
            "model.dim": "256", "model.depth": "4", "model.heads": "4", "model.max_seq_len": str(COLUMNS),
            "serve.device": plan.size.device, "serve.precision": plan.size.precision,
            "serve.deterministic": "true", "serve.threads": "1", "checkpoints.every_steps": str(SAVE_EVERY),
        }  # fmt: skip
        if plan.kills < 2:
            settings |= {"model.dim": "64", "model.depth": "1", "model.heads": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        if token:
            (folder / "tokens").write_text(f"{token}\n")
            settings["serve.token_train_file"] = str(folder / "tokens")
        self.server = Server(folder, settings)
        self._steps, self._deadline = steps, deadline
        draw = random.Random(number)
        self._kill_after = sorted(draw.sample(range(1, steps), kills))
        self._moment = draw
        self.kills = 0
        self.address = ""
        self.started = threading.Event()
        self.proceed = threading.Event()
        """The last step waits for it."""
        self.proceed.set()
        self.fingerprint = ""
        self.error: BaseException | None = None
        self._restart_seconds = 0.0

    def run(self) -> None:
        """Train to the end; an exception is kept in `error`."""
        try:
            self._run()
        except BaseException as error:
            self.error = error
        finally:
            self.started.set()
            self.server.end()

    def _run(self) -> None:
        self._start()
        self.started.set()
        with maskwire.connect(
            self.server.address, name="bench", window=WINDOW, retry_for=120, on_wait=lambda _: None
        ) as trainer:
            waiting: deque[Any] = deque()
            for step in range(1, self._steps + 1):
                if step == self._steps:
                    self.proceed.wait(max(0.0, self._deadline - time.monotonic()))
                waiting.append(trainer.submit(batch(step)))
                while len(waiting) == WINDOW or (step == self._steps and waiting):
                    answer = waiting.popleft().result()
                    if self._kill_after and answer.step >= self._kill_after[0]:
                        self._kill_after.pop(0)
                        self._kill()
            saved = trainer.checkpoint("end")
            self.fingerprint = fingerprint(
                self.server.folder / "run" / "checkpoints" / saved.name, trainer.digest
            )

    def _kill(self) -> None:
        """Kill the server with steps in flight, at a random moment, and start it again, if there is time."""
        if time.monotonic() + 2 * self._restart_seconds + 5 > self._deadline:
            return
        time.sleep(self._moment.random() * 0.05)
        self.server.kill()
        self._start()
        self.kills += 1

    def _start(self) -> None:
        began = time.monotonic()
        self.server.spawn()
        self.address = self.server.ready(self._deadline)
        self._restart_seconds = max(self._restart_seconds, time.monotonic() - began)


def batch(step: int) -> Any:
    """The ids of a step, int64 [rows, columns]."""
    return np.random.default_rng(step).integers(0, 256, (ROWS, COLUMNS))


def fingerprint(checkpoint: Path, digest: bytes) -> str:
    """SHA-256 of the files of weights and optimizer state, and of the digest of the history."""
    sha = hashlib.sha256(digest)
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, f"no weights in {checkpoint}"
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()


def refused(address: str, count: int, deadline: float) -> int:
    """Send requests with bad tokens, 16 at a time. Returns how many were refused as UNAUTHENTICATED."""
    methods = {
        "GetStatus": pb.GetStatusRequest(), "TrainStep": pb.TrainStepRequest(),
        "EvalLoss": pb.EvalLossRequest(), "OpenSession": pb.OpenSessionRequest(),
    }  # fmt: skip
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(16) as pool:
        stub: Any = pb_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]

        def ask(number: int) -> bool:
            name = list(methods)[number % len(methods)]
            metadata = (("authorization", f"Bearer {secrets.token_urlsafe(number % 64 + 1)}"),)
            try:
                getattr(stub, name)(methods[name], metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        return sum(pool.map(lambda number: time.monotonic() < deadline and ask(number), range(count)))


def resume(plan: Plan, room: Path, deadline: float, tell: Callable[[str], None]) -> list[Row]:
    """The rows of R11."""
    began = time.monotonic()
    each = [plan.kills // plan.lanes + (number < plan.kills % plan.lanes) for number in range(plan.lanes)]
    steps = max(LEAST_STEPS, STEPS_PER_KILL * max(each))
    until = deadline - 5
    token = secrets.token_hex(16)
    reference = Lane(plan, room / "r", 0, 0, steps, until, token)
    reference.proceed.clear()
    lanes = [Lane(plan, room / f"k{n}", n, kills, steps, until) for n, kills in enumerate(each, 1)]
    tell(f"R11: {plan.kills} kills of {plan.lanes} servers side by side, {steps} steps each …")
    threads = [threading.Thread(target=lane.run, daemon=True) for lane in (reference, *lanes)]
    for thread in threads:
        thread.start()
    count, alive = 0, False
    if reference.started.wait(max(0.0, until - time.monotonic())) and reference.error is None:
        try:
            count = refused(reference.address, plan.bad_tokens, until)
        except grpc.RpcError as error:
            tell(f"  bad tokens: {error}")
        alive = reference.server.alive
        reference.proceed.set()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for lane in (reference, *lanes):
        lane.server.end()
    tell(f"R11 took {time.monotonic() - began:.0f} s")
    return [killed(plan, reference, lanes, tell), tokens(plan, count, alive, reference)]


def killed(plan: Plan, reference: Lane, lanes: list[Lane], tell: Callable[[str], None]) -> Row:
    """The row of kills: those after which the run ended like the undisturbed one."""
    precision, device = plan.size.precision, plan.size.device
    what = f"kill -9 and resume, deterministic kernels, {precision}, {device}: kills, hashes equal"
    row = Row("R11", what, f"≥ {plan.kills}", None)
    for number, lane in enumerate((reference, *lanes)):
        if lane.error is not None:
            tell(f"  server {number}: {type(lane.error).__name__}: {lane.error}")
    if not reference.fingerprint:
        row.note = f"not measured: the undisturbed run did not end: {said(reference)}"
        return row
    ended = [lane for lane in lanes if lane.fingerprint]
    equal = sum(lane.kills for lane in ended if lane.fingerprint == reference.fingerprint)
    total = sum(lane.kills for lane in lanes)
    other = sum(lane.fingerprint != reference.fingerprint for lane in ended)
    failed = [lane for lane in lanes if not lane.fingerprint]
    row.value = float(equal)
    row.met = equal >= plan.kills
    row.parts = {
        "kills": total,
        "runs": len(lanes),
        "runs with another hash": other,
        "runs that failed": len(failed),
    }
    if failed:
        row.note = f"a run did not end: {said(failed[0])}"
    elif not other and total < plan.kills:
        row.note, row.met = f"time for {total} of {plan.kills} kills", None
    return row


def said(lane: Lane) -> str:
    """Why a lane failed, for a table's cell."""
    text = "the time was over" if lane.error is None else f"{type(lane.error).__name__}: {lane.error}"
    return " ".join(text.split())[:300].replace("|", "/")


def tokens(plan: Plan, count: int, alive: bool, reference: Lane) -> Row:
    """The row of requests with bad tokens."""
    what = "requests with bad tokens refused while the server trains; the process lives and ends its run"
    row = Row("R11", what, f"≥ {plan.bad_tokens}", None)
    if not count:
        row.note = f"not measured: {said(reference)}"
        return row
    row.value = float(count)
    row.met = count >= plan.bad_tokens and alive and bool(reference.fingerprint)
    if not alive or not reference.fingerprint:
        row.note = f"the server did not live: {said(reference)}"
    return row
