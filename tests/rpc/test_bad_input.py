"""Every kind of bad input over a real port: a clear refusal, and the next good step has the next number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serving import ServerProcess

from maskwire.v1 import training_service_pb2 as pb

GOOD = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16


def batch(**changes: Any) -> pb.TokenBatch:
    fields: dict[str, Any] = {"data": GOOD.tobytes(), "shape": [2, 16], "dtype": pb.DATA_TYPE_UINT8}
    return pb.TokenBatch(**{**fields, **changes})


def ids(row: int, column: int, value: int) -> pb.TokenBatch:
    changed = GOOD.astype(np.int64)
    changed[row, column] = value
    return batch(data=changed.tobytes(), dtype=pb.DATA_TYPE_INT64)


CASES: dict[str, tuple[pb.TrainStepRequest, str, list[str]]] = {
    "an id below 0": (
        pb.TrainStepRequest(batch=ids(1, 3, -5)), "batch.data", ["row 1, column 3", "-5", "0 to 16"]),
    "an id at num_tokens": (
        pb.TrainStepRequest(batch=ids(0, 2, 17)), "batch.data", ["row 0, column 2", "num_tokens is 17"]),
    "an id far above": (
        pb.TrainStepRequest(batch=ids(1, 0, 2**62)), "batch.data", ["row 1, column 0", str(2**62)]),
    "the mask id": (
        pb.TrainStepRequest(batch=ids(0, 15, 16)), "batch.data", ["row 0, column 15", "reserve an id"]),
    "an id in a ragged row": (
        pb.TrainStepRequest(batch=batch(data=bytes([1, 2, 3, 4, 99]), shape=[2, 4], lengths=[1, 4])),
        "batch.data", ["row 1, column 3", "99"]),
    "too few bytes": (
        pb.TrainStepRequest(batch=batch(data=b"123")), "batch.data", ["32 bytes", "got 3"]),
    "bytes of another type": (
        pb.TrainStepRequest(batch=batch(dtype=pb.DATA_TYPE_INT32)), "batch.data", ["128 bytes", "got 32"]),
    "one dimension": (pb.TrainStepRequest(batch=batch(shape=[32])), "batch.shape", ["[rows, columns]", "1"]),
    "three dimensions": (pb.TrainStepRequest(batch=batch(shape=[2, 4, 4])), "batch.shape", ["3 dimensions"]),
    "a negative shape": (
        pb.TrainStepRequest(batch=batch(shape=[-2, -16])), "batch.shape", ["rows", "at least 1", "-2"]),
    "a shape that overflows": (
        pb.TrainStepRequest(batch=batch(shape=[2**62, 32])), "batch.shape", ["at most 1048576", str(2**62)]),
    "zero rows": (pb.TrainStepRequest(batch=batch(data=b"", shape=[0, 16])), "batch.shape", ["rows"]),
    "zero columns": (
        pb.TrainStepRequest(batch=batch(data=b"", shape=[2, 0])), "batch.shape", ["columns", "got 0"]),
    "no type": (
        pb.TrainStepRequest(batch=batch(dtype=pb.DATA_TYPE_UNSPECIFIED)), "batch.dtype", ["DATA_TYPE_UINT8"]),
    "an unknown type": (pb.TrainStepRequest(batch=batch(dtype=77)), "batch.dtype", ["77"]),
    "a row too long": (
        pb.TrainStepRequest(batch=batch(data=bytes(33), shape=[1, 33])), "batch.shape", ["at most 32", "33"]),
    "too many tokens": (
        pb.TrainStepRequest(batch=batch(data=b"", shape=[2**16, 32])), "batch.shape", ["at most 1048576"]),
    "lengths of another number": (
        pb.TrainStepRequest(batch=batch(lengths=[16])), "batch.lengths", ["one length per row (2)", "got 1"]),
    "a length of 0": (
        pb.TrainStepRequest(batch=batch(lengths=[16, 0])), "batch.lengths", ["row 1", "1 to 16", "got 0"]),
    "a length beyond the columns": (
        pb.TrainStepRequest(batch=batch(lengths=[17, 16])), "batch.lengths", ["row 0", "got 17"]),
    "columns that no row has": (
        pb.TrainStepRequest(batch=batch(lengths=[15, 14])), "batch.lengths", ["16 tokens", "got 15"]),
    "a prompt of another size": (
        pb.TrainStepRequest(batch=batch(prompt_mask=b"\1")), "batch.prompt_mask", ["4 bytes", "got 1"]),
    "prompt bits behind the end": (
        pb.TrainStepRequest(batch=batch(data=bytes(3), shape=[1, 3], prompt_mask=b"\x09")),
        "batch.prompt_mask", ["must be 0"]),
    "prompts that cover every row": (
        pb.TrainStepRequest(batch=batch(prompt_mask=b"\xff" * 4)), "batch.prompt_mask", ["leave at least"]),
    "no batch": (pb.TrainStepRequest(), "batch", ["missing"]),
    "both flags": (
        pb.TrainStepRequest(batch=batch(), only_train_generator=True, only_train_critic=True),
        "only_train_critic", ["cannot both be set"]),
    "critic training without a critic": (
        pb.TrainStepRequest(batch=batch(), only_train_critic=True), "only_train_critic", ["lacks"]),
    "a negative temperature": (
        pb.TrainStepRequest(batch=batch(), generator_sample_temperature=-1),
        "generator_sample_temperature", ["at least 0", "-1"]),
    "a temperature that is no number": (
        pb.TrainStepRequest(batch=batch(), generator_sample_temperature=math.nan),
        "generator_sample_temperature", ["nan"]),
    "an infinite temperature": (
        pb.TrainStepRequest(batch=batch(), generator_sample_temperature=math.inf),
        "generator_sample_temperature", ["inf"]),
    "a negative learning rate": (
        pb.TrainStepRequest(batch=batch(), learning_rate=-0.1), "learning_rate", ["-0.1"]),
    "a learning rate that is no number": (
        pb.TrainStepRequest(batch=batch(), learning_rate=math.nan), "learning_rate", ["nan"]),
    "a request id that is not printable": (
        pb.TrainStepRequest(batch=batch(), request_id="a\nb"), "request_id", ["printable"]),
    "a request id that is too long": (
        pb.TrainStepRequest(batch=batch(), request_id="x" * 129), "request_id", ["1 to 128"]),
    "step 0": (pb.TrainStepRequest(batch=batch(), step=0), "step", ["at least 1", "got 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name_and_the_next_step_has_the_next_number(
    shared: ServerProcess, stub: Callable[[ServerProcess], Any], case: str
) -> None:
    request, field, parts = CASES[case]
    service = stub(shared)
    before = service.GetStatus(pb.GetStatusRequest())
    with pytest.raises(grpc.RpcError) as raised:
        service.TrainStep(request, timeout=30)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    for part in parts:
        assert part in error.details()
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    details = rpc_status.from_call(error).details
    assert details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["field"]) == ("INVALID_FIELD", "maskwire", field)
    assert details[1].Unpack(bad)
    assert bad.field_violations[0].field == field
    after = service.GetStatus(pb.GetStatusRequest())
    assert (after.step, after.digest) == (before.step, before.digest)
    answer = service.TrainStep(pb.TrainStepRequest(batch=batch()), timeout=30)
    assert answer.step == before.step + 1


def test_a_message_over_the_size_limit_is_resource_exhausted_with_the_limit(
    serve: Callable[..., ServerProcess], stub: Callable[[ServerProcess], Any]
) -> None:
    server = serve(seconds=0, serve__max_message_bytes="65536")
    service = stub(server)
    with pytest.raises(grpc.RpcError) as raised:
        service.TrainStep(pb.TrainStepRequest(batch=batch(data=bytes(70_000))), timeout=30)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "65536" in error.details()
    assert service.TrainStep(pb.TrainStepRequest(batch=batch()), timeout=30).step == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.EvalLossRequest(batch=batch(), draws=-1), "draws"),
        (pb.EvalLossRequest(batch=batch(), draws=1025), "draws"),
        (pb.EvalLossRequest(batch=batch(), row_ids=[1]), "row_ids"),
        (pb.EvalLossRequest(batch=batch(), text_bytes=0), "text_bytes"),
        (pb.EvalLossRequest(batch=batch(), only_train_critic=True), "only_train_critic"),
        (pb.EvalLossRequest(), "batch"),
    ],
)
def test_a_bad_evaluation_is_refused_by_name(
    shared: ServerProcess, stub: Callable[[ServerProcess], Any], request_: pb.EvalLossRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub(shared).EvalLoss(request_, timeout=30)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(field)


def test_bytes_that_are_no_message_are_refused_like_a_bad_field_by_every_rpc(shared: ServerProcess) -> None:
    from maskwire.errors import read_failure

    with grpc.insecure_channel(shared.address) as channel:
        for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods:
            call = channel.unary_stream(f"/maskwire.v1.TrainingService/{method.name}")
            with pytest.raises(grpc.RpcError) as raised:
                list(call(b"\xff\xff\xff", timeout=30))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method.name
            error = read_failure(raised.value).error
            assert error.reason == "INVALID_FIELD"
            assert f"must be a {method.input_type.full_name}" in str(error)
    assert "Traceback" not in shared.log.read_text()
