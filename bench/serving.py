"""P2 and P3: the cost of a durable step, compared with a bare echo, a durable insert, and a Ray actor."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np

import maskwire
from bench.harness import Row, in_turn, module, process, ratio, seconds_of
from bench.minimal_server import database
from bench.stretches import SKIPPED
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

BATCH = np.random.default_rng(0).integers(0, 256, (128, 512)).astype(np.uint8)  # 64 KiB
PAYLOAD = BATCH.tobytes()
REQUEST = pb.TrainStepRequest(batch=pb.TokenBatch(data=PAYLOAD, shape=BATCH.shape, dtype=pb.DATA_TYPE_UINT8))


def measure(quick: bool) -> list[Row]:
    """The rows of P2 and P3."""
    count, rounds = (100, 3) if quick else (400, 7)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        with (
            process(*module("null_server", room / "run"), log=room / "null.log") as target,
            process(*module("echo_server"), log=room / "echo.log") as echo_target,
            process(
                *module("minimal_server", room / "minimal.sqlite"), log=room / "minimal.log"
            ) as least_target,
            maskwire.connect(target, name="one", window=8) as trainer,
            grpc.insecure_channel(echo_target) as channel,
            grpc.insecure_channel(least_target) as least_channel,
        ):
            echo: Any = channel.unary_unary("/bench.Echo/Echo")
            least: Any = pb_grpc.TrainingServiceStub(least_channel).TrainStep  # type: ignore[no-untyped-call]
            insert = durable_insert(room)
            ray = RayActor()
            measures: list[Callable[[], float]] = [
                lambda: seconds_of(lambda: trainer.train_step(BATCH), count),
                lambda: seconds_of(lambda: echo(PAYLOAD), count),
                lambda: seconds_of(insert, count),
                lambda: in_flight(lambda: trainer.submit(BATCH), count),
                lambda: in_flight(lambda: echo.future(PAYLOAD), count),
                lambda: seconds_of(lambda: least(REQUEST), count),
                lambda: in_flight(lambda: least.future(REQUEST), count),
            ]
            if ray.there:
                measures += [
                    lambda: seconds_of(ray.call, count),
                    lambda: in_flight(lambda: ray.submit(), count),
                ]
            in_turn(1, *measures)  # warm
            step, bare, disk, windowed, bare_windowed, minimal, minimal_windowed, *actor = in_turn(
                rounds, *measures
            )
            ray.close()
        traced = where_time_goes(room, count)
    floor = [b + d for b, d in zip(bare, disk, strict=True)]
    what = "a durable step that computes nothing, 64 KiB"
    parts = {
        "step ms": median(step) * 1e3, "echo ms": median(bare) * 1e3, "insert ms": median(disk) * 1e3,
        "8 in flight, steps/s": 1 / median(windowed), "8 in flight, echoes/s": 1 / median(bare_windowed),
    }  # fmt: skip
    least_parts = {"ms": median(minimal) * 1e3, "8 in flight, steps/s": 1 / median(minimal_windowed)}
    rows = [
        ratio(Row("P2", f"latency of {what} ÷ (grpcio echo + SQLite insert)", "≤ 1.3", None, parts=parts),
              step, floor, at_most=1.3),
        ratio(Row("P2", "the same of bench/minimal_server.py: hash, insert, answer", "(the floor)", None,
                  parts=least_parts), minimal, floor),
        ratio(Row("P3", "steps per second, 8 in flight ÷ echoes per second, 8 in flight", "≥ 0.5", None),
              bare_windowed, windowed, at_least=0.5),
        ratio(Row("P3", "the same of bench/minimal_server.py", "(the floor)", None),
              bare_windowed, minimal_windowed),
        Row("P2", f"CPU of the server for {what}, ms", "≤ 0.9", traced["cpu_ms"],
            met=traced["cpu_ms"] <= 0.9, parts={"a bare call from start to end, ms": traced["call_ms"]} | {
                f"{words}, ms": ms for words, ms in traced["ms"].items()}),
    ]  # fmt: skip
    latency = Row("P2", "latency ÷ a Ray actor's call, which makes nothing durable", "≤ 1.1", None)
    speed = Row("P3", "steps per second ÷ a Ray actor's calls per second", "≥ 1.0", None)
    if not actor:
        latency.note = speed.note = 'not measured: pip install "maskwire[ray]"'
        return [*rows, latency, speed]
    latency.parts = {"actor ms": median(actor[0]) * 1e3}
    speed.parts = {"actor calls/s": 1 / median(actor[1])}
    return [
        *rows,
        ratio(latency, step, actor[0], at_most=1.1),
        ratio(speed, actor[1], windowed, at_least=1.0),
    ]


def where_time_goes(room: Path, count: int) -> dict[str, Any]:
    """The server's CPU per step, and where the latency of a bare call goes, in milliseconds."""
    found = room / "stretches.json"
    with (
        process(*module("null_server", room / "traced", found), log=room / "traced.log") as target,
        grpc.insecure_channel(target) as channel,
    ):
        stub = pb_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        seconds_of(lambda: stub.TrainStep(REQUEST), SKIPPED)
        call = seconds_of(lambda: stub.TrainStep(REQUEST), 4 * count)
    return {**json.loads(found.read_text()), "call_ms": 1e3 * call}


def in_flight(submit: Callable[[], Any], count: int, window: int = 8) -> float:
    """Seconds per call, with `window` calls in flight."""

    def run() -> None:
        waiting: deque[Any] = deque()
        for _ in range(count):
            waiting.append(submit())
            if len(waiting) == window:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()

    return seconds_of(run, 1) / count


def durable_insert(room: Path) -> Callable[[], None]:
    """One 64 KiB insert, flushed, under the journal's settings."""
    opened = database(str(room / "insert.sqlite"))

    def insert() -> None:
        opened.execute("INSERT INTO payloads (payload) VALUES (?)", (PAYLOAD,))

    return insert


class RayActor:
    """A Ray actor that takes the same bytes, if Ray is installed."""

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            self.there = False
            return
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

        @ray.remote
        class Echo:
            def call(self, data: bytes) -> bytes:  # noqa: ARG002
                return bytes(100)

        make: Any = Echo
        self.there, self._ray, self._actor = True, ray, make.remote()

    def call(self) -> None:
        self._ray.get(self._actor.call.remote(PAYLOAD))

    def submit(self) -> Any:
        return self._actor.call.remote(PAYLOAD).future()

    def close(self) -> None:
        if self.there:
            self._ray.shutdown()
