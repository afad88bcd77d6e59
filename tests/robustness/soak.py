"""R7: many calls, a tenth of them cancelled; memory, descriptors and threads stay where they are."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from robustness.processes import Server

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

CLIENTS = 4
AT_ONCE = 200
"""More calls than the server has worker threads."""


def run(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """The slope of the server's resident memory in MiB per 100,000 calls, and what else grew."""
    samples: list[tuple[int, float]] = []
    done = [0] * CLIENTS
    began = time.monotonic()
    with Server(folder, checkpoints__every_seconds="30", serve__keep_payloads="recovery") as server:
        assert server.start(), server.tail()
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        _fill_pool(server.address)
        threads = [
            threading.Thread(target=_client, args=(server.address, seed + i, count // CLIENTS, done, i))
            for i in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        first: tuple[int, int] | None = None
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.25)
            calls = sum(done)
            if calls > count // 4:  # warmed up: pools, caches, arenas
                samples.append((calls, process.memory_info().rss / 2**20))
                if first is None:
                    first = process.num_threads(), process.num_fds()
        for thread in threads:
            thread.join()
        time.sleep(1.0)
        assert first is not None
        last = process.num_threads(), process.num_fds()
        assert server.alive
        assert server.starts == 1
        steps = _steps(server.address)
        assert "Traceback" not in (server.folder / "log").read_text(), server.tail()
        assert server.terminate() == 0
    slope = float(np.polyfit(*np.array(samples).T, 1)[0]) * 100_000 if len(samples) > 2 else 0.0
    assert sum(done) == count, "a client ended early; its thread's error is above"
    assert last[0] <= first[0] + 4, f"threads went from {first[0]} to {last[0]}"
    assert last[1] <= first[1] + 8, f"descriptors went from {first[1]} to {last[1]}"
    assert count < 100_000 or slope < 1, f"the memory grows by {slope:.1f} MiB per 100,000 calls"
    return {
        "calls": sum(done), "steps": steps, "MiB per 100,000 calls": round(slope, 2),
        "threads": list(zip(("warm", "end"), (first[0], last[0]), strict=True)),
        "descriptors": list(zip(("warm", "end"), (first[1], last[1]), strict=True)),
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def _fill_pool(address: str) -> None:
    """Make the server start all its worker threads, which it keeps: later ones would be a leak."""
    batch = pb.TokenBatch(data=bytes([20]) * 32, shape=[2, 16], dtype=pb.DATA_TYPE_UINT8)
    with grpc.insecure_channel(address) as channel:
        service: Any = pb_grpc.TrainingServiceStub(channel)
        for _ in range(5):
            calls = [service.TrainStep.future(pb.TrainStepRequest(batch=batch)) for _ in range(AT_ONCE)]
            for call in calls:
                error = call.exception()
                assert error is None or error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error


def _steps(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return int(pb_grpc.TrainingServiceStub(channel).GetStatus(pb.GetStatusRequest()).step)


def _client(address: str, seed: int, count: int, done: list[int], number: int) -> None:
    draw = random.Random(seed)
    batch = pb.TokenBatch(data=bytes([20 + number]) * 32, shape=[2, 16], dtype=pb.DATA_TYPE_UINT8)
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        service: Any = pb_grpc.TrainingServiceStub(channel)
        for _ in range(count):
            kind = draw.random()
            if kind < 0.5:
                call = service.TrainStep.future(pb.TrainStepRequest(batch=batch), timeout=30)
            elif kind < 0.7:
                call = service.EvalLoss.future(pb.EvalLossRequest(batch=batch), timeout=30)
            else:
                call = service.GetStatus.future(pb.GetStatusRequest(), timeout=30)
            if draw.random() < 0.002:
                asked = pb.GenerateRequest(count=2, length=8, stream_steps=True)
                stream = service.Generate(asked, timeout=30)
                next(stream)
                stream.cancel()
            if draw.random() < 0.1:
                if draw.random() < 0.5:
                    time.sleep(0.001)
                call.cancel()
            else:
                try:
                    call.result()
                except grpc.RpcError as error:
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error  # type: ignore[attr-defined]
            done[number] += 1
