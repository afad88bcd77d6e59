"""R6: requests that no client of ours would send; each gets a clear refusal, and the memory stays level."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from robustness.processes import Server

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.errors import Refused
from maskwire_server.requests import EvalRequest, GenerateRequest
from maskwire_server.rpc import decoding, generate

INFO = ModelInfo(257, 256, None, 64, 1, "counting", True, True)
LIMITS = Limits(1 << 20, 1 << 22, 8, 64, max_read_tokens=1 << 16)
READERS: dict[str, tuple[Any, Any]] = {
    "TrainStep": (pb.TrainStepRequest, lambda message: decoding.read_step(message, INFO, LIMITS)),
    "EvalLoss": (pb.EvalLossRequest, lambda message: decoding.read_eval(message, INFO, LIMITS)),
    "OpenSession": (pb.OpenSessionRequest, decoding.read_open),
    "Checkpoint": (pb.CheckpointRequest, decoding.read_save),
    "RestoreCheckpoint": (pb.RestoreCheckpointRequest, decoding.read_restore),
    "Generate": (pb.GenerateRequest, lambda message: generate.read_generate(message, INFO, LIMITS)),
    "DeleteCheckpoint": (pb.DeleteCheckpointRequest, lambda m: decoding.read_checkpoint_name(m.name)),
    "CloseSession": (pb.CloseSessionRequest, lambda message: decoding.read_session(message.session)),
    "DownloadCheckpoint": (pb.DownloadCheckpointRequest, decoding.read_download),
}
_SIZES = [0, 1, -1, 2, 7, 8, 64, 65, 1 << 20, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63)]
_TEXTS = ["", "a", "x" * 129, "\0", "ü", "\n", "../../etc", "step-1", "A", "a" * 64, "a" * 65, "{}", "%s"]


def request(draw: random.Random, name: str) -> Any:
    """A request whose fields are each right, at an edge, or nonsense."""
    message = READERS[name][0]()
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.6:
            _fill(draw, message, field)
    return message


def _fill(draw: random.Random, message: Any, field: Any) -> None:
    repeated = field.is_repeated
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(draw.choice([0, 1, 3, 40])):
            getattr(message, field.name)[draw.choice(_TEXTS)] = draw.choice(_TEXTS)
        return
    if field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if field.name in ("batch", "prompts"):
            _fill_batch(draw, inner)
            return
        for below in inner.DESCRIPTOR.fields:
            if draw.random() < 0.7:
                _fill(draw, inner, below)
        return
    if repeated:
        values = [_value(draw, field) for _ in range(draw.choice([0, 1, 2, 5, 70]))]
        getattr(message, field.name).extend(values)
    else:
        setattr(message, field.name, _value(draw, field))


def _fill_batch(draw: random.Random, batch: Any) -> None:
    rows, columns = draw.choice([(1, 1), (2, 8), (4, 64), (2, 65), (0, 8), (2, 0)])
    kind = draw.choice([1, 2, 3, 4])
    width = {1: "<u1", 2: "<u2", 3: "<i4", 4: "<i8"}[kind]
    ids = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, (rows, columns)).astype(width)
    if draw.random() < 0.5 and ids.size and kind != 1:
        ids.flat[draw.randrange(ids.size)] = draw.choice([256, 257, 300, 65535])
    data = ids.tobytes()
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data) + 1)] + draw.randbytes(draw.choice([0, 1, 9]))
    batch.data = data
    batch.dtype = kind if draw.random() < 0.8 else draw.choice([0, 5, 99, -1])
    batch.shape.extend([rows, columns] if draw.random() < 0.8 else draw.choices(_SIZES, k=draw.randrange(5)))
    if draw.random() < 0.3:
        small = [size for size in _SIZES if -(1 << 31) <= size < 1 << 31]
        batch.lengths.extend(draw.choices(small, k=draw.randrange(5)))
    if draw.random() < 0.3:
        batch.prompt_mask = draw.randbytes(draw.choice([0, 1, 2, 8, 33]))


def _value(draw: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING and field.type == field.TYPE_BYTES:
        return draw.randbytes(draw.choice([0, 31, 32, 33]))
    if kind == field.CPPTYPE_STRING:
        return draw.choice(_TEXTS)
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return draw.choice([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308, 5e-324])
    if kind == field.CPPTYPE_BOOL:
        return draw.random() < 0.5
    low, high = (-(1 << 63), (1 << 63) - 1) if kind == field.CPPTYPE_INT64 else (-(1 << 31), (1 << 31) - 1)
    if kind == field.CPPTYPE_ENUM:
        return draw.choice([0, 1, 2, 3, 99])
    return draw.choice([size for size in _SIZES if low <= size <= high])


def mutated(draw: random.Random, name: str) -> bytes:
    """A request's bytes, some of them changed, cut or repeated."""
    data = bytearray(request(draw, name).SerializeToString())
    for _ in range(draw.choice([0, 0, 1, 2, 8])):
        if not data:
            break
        at = draw.randrange(len(data))
        kind = draw.randrange(4)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randrange(1, 33)]
        else:
            data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, (1 << 64) - 1, 1 << 63]))
    return bytes(data)


def _positions(found: Any) -> int:
    """At least what a request pushes through the model: its passes times its columns."""
    if isinstance(found, EvalRequest):
        passes = found.options.draws * (found.batch.columns if found.options.chain_rule else 1)
        return found.batch.rows * found.batch.columns * passes
    if isinstance(found, GenerateRequest):
        unknown = found.prompts.unknown
        passes = unknown.sum(-1) if not found.options.steps else unknown.sum(-1).clip(max=found.options.steps)
        return int(passes.sum()) * unknown.shape[1]
    return 0


def in_process(seed: int, count: int) -> dict[str, Any]:
    """Requests through the reading of them alone; anything raised but a refusal is a fault."""
    draw = random.Random(seed)
    tally: Counter[str] = Counter()
    process = psutil.Process()
    before = 0
    for number in range(count):
        if number == count // 4:
            before = process.memory_info().rss
        name = draw.choice(sorted(READERS))
        kind, read = READERS[name]
        try:
            message = request(draw, name) if draw.random() < 0.5 else kind.FromString(mutated(draw, name))
        except Exception:  # protobuf's own refusal of the bytes
            tally["no message"] += 1
            continue
        try:
            found = read(message)
            tally["accepted"] += 1
            assert _positions(found) <= LIMITS.max_read_tokens, f"{name} asks for too much: {message}"
        except Refused as refusal:
            assert refusal.message, "a refusal without words"
            tally[refusal.reason] += 1
    grown = (process.memory_info().rss - before) / 2**20
    assert grown < 64, f"the memory grew by {grown:.0f} MiB"
    return {"requests": count, "answers": dict(tally), "memory grew by MiB": round(grown, 1)}


def over_the_wire(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """The same, as bytes, at a running server; it must go on as if nothing had been."""
    draw = random.Random(seed)
    tally: Counter[str] = Counter()
    with Server(
        folder, serve__gap_seconds="0.05", serve__max_draws="64", serve__max_read_tokens="65536"
    ) as server:
        assert server.start(), server.tail()
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        before = 0
        with grpc.insecure_channel(server.address) as channel:
            methods = [method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods]
            calls: dict[str, Any] = {
                name: channel.unary_stream(f"/maskwire.v1.TrainingService/{name}") for name in methods
            }
            for number in range(count):
                name = draw.choice(methods)
                data = mutated(draw, name if name in READERS else draw.choice(sorted(READERS)))
                answers = calls[name](data, timeout=30)
                try:
                    for _ in answers:
                        pass
                    code = grpc.StatusCode.OK
                except grpc.RpcError:
                    code = answers.code()
                tally[code.name] += 1
                assert code is not grpc.StatusCode.UNKNOWN, f"{name}: {answers.details()}"
                assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, f"{name} hangs: {data.hex()}"
                if number == count // 4:
                    before = process.memory_info().rss
            grown = (process.memory_info().rss - before) / 2**20
        assert server.starts == 1
        assert server.alive
        assert grown < 64, f"the server's memory grew by {grown:.0f} MiB"
        assert "Traceback" not in (server.folder / "log").read_text(), server.tail()
        assert server.terminate() == 0
    return {"requests": count, "codes": dict(tally), "memory grew by MiB": round(grown, 1)}
