"""A server that hangs, or whose device has failed, ends with an exit code of its own, and comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from counter import HANG_ID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import COUNTING, ServerProcess

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire_server.engine.quarantine import FILE_NAME
from maskwire_server.exit_codes import EXIT_DEVICE, EXIT_HUNG

Serve = Callable[..., ServerProcess]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LOST_ID = 5
MODEL = f"""
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.ids = nn.Embedding(tokens, dim)
        self.output = nn.Linear(dim, tokens)

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids, attention_mask):
        if (input_ids == {LOST_ID}).any():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        e = self.ids(input_ids) * attention_mask[..., None]
        return self.output(e + e.sum(1, keepdim=True))

def build(model, dim):
    return Model(model.num_tokens, dim)
"""


def batch(first: int) -> pb.TokenBatch:
    ids = np.full((2, 8), first, dtype=np.uint8)
    return pb.TokenBatch(data=ids.tobytes(), shape=ids.shape, dtype=pb.DATA_TYPE_UINT8)


def step(first: int, request_id: str = "") -> pb.TrainStepRequest:
    return pb.TrainStepRequest(batch=batch(first), request_id=request_id or f"id-{first}")


def call(server: ServerProcess, method: str, request: Any) -> Any:
    """The answer, the answers of a stream, or the status code of the error."""
    with grpc.insecure_channel(server.address) as channel:
        try:
            found = getattr(pb_grpc.TrainingServiceStub(channel), method)(request, timeout=60)
            return list(found) if method == "Generate" else found
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]


class Liveness(threading.Thread):
    """What a watcher of the health service `liveness` hears."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self.channel = grpc.insecure_channel(server.address)
        self.heard: list[int] = []
        stream = health_pb2_grpc.HealthStub(self.channel).Watch
        self.answers = stream(health_pb2.HealthCheckRequest(service="liveness"))
        self.heard.append(next(self.answers).status)
        self.start()

    def run(self) -> None:
        try:
            for answer in self.answers:
                self.heard.append(answer.status)
        except grpc.RpcError:
            self.channel.close()


def test_a_step_that_hangs_ends_the_process_and_is_quarantined_when_it_hangs_again(serve: Serve) -> None:
    server = serve(seconds=0, serve__step_timeout_seconds="0.3", serve__poison_after="2")
    for _ in range(2):
        assert call(server, "TrainStep", step(1)).step == 1  # the shape's first step; then a recorded answer
        assert call(server, "TrainStep", step(2)).step == 2
        server._command.append("--hang=")  # a restart has no first steps
        liveness = Liveness(server)
        assert call(server, "TrainStep", step(HANG_ID)) is grpc.StatusCode.UNAVAILABLE
        assert server._reap() == EXIT_HUNG
        liveness.join(60)
        assert liveness.heard == [SERVING, NOT_SERVING]
        assert (server.folder / "run" / FILE_NAME).exists()
        server.start()
    log = server.log.read_text()
    assert log.count("step 3 has made no progress for 0.3 s: the server exits with code 71") == 2
    assert log.count("most recent call first") >= 6, "the stacks of its threads"
    assert "in train_step" in log
    answer = call(server, "TrainStep", step(HANG_ID))
    assert (answer.step, answer.outcome) == (3, pb.STEP_OUTCOME_POISON)
    assert call(server, "TrainStep", step(4)).step == 4
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("method", "request_", "words"),
    [
        ("eval_loss", ("EvalLoss", pb.EvalLossRequest(batch=batch(1))), "an evaluation"),
        ("generate", ("Generate", pb.GenerateRequest(count=1, length=4)), "a generation"),
        ("snapshot", ("Checkpoint", pb.CheckpointRequest(name="a")), "the copy for a checkpoint"),
    ],
    ids=["evaluation", "generation", "save"],
)
def test_a_read_or_a_save_that_hangs_ends_the_process(
    tmp_path: Path, method: str, request_: tuple[str, Any], words: str
) -> None:
    server = ServerProcess(
        tmp_path, [*COUNTING, "0", f"--hang={method}"], model__num_tokens="257", model__mask_id="256",
        serve__step_timeout_seconds="0.3",
    ).start()  # fmt: skip
    assert call(server, "TrainStep", step(1)).step == 1
    assert call(server, *request_) is grpc.StatusCode.UNAVAILABLE
    assert server._reap() == EXIT_HUNG
    assert f"{words} has made no progress for 0.3 s" in server.log.read_text()


def test_work_that_may_compile_kernels_first_is_no_hang(serve: Serve) -> None:
    server = serve(seconds=0.5, serve__step_timeout_seconds="0.1")
    assert call(server, "TrainStep", step(1)).step == 1, "it may compile kernels"
    assert call(server, "EvalLoss", pb.EvalLossRequest(batch=batch(1))).step == 1
    call(server, "TrainStep", step(2))
    assert server._reap() == EXIT_HUNG


def test_an_error_of_the_device_that_lasts_ends_the_process(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    server = serve(
        model__source="python", model__num_tokens="17", model__mask_id="16", model__max_seq_len="8",
        model__python__factory="failing_model:build", model__python__options__dim="8",
        objective__no_replace_prob="1", serve__poison_after="1",
    )  # fmt: skip
    assert call(server, "TrainStep", step(1)).step == 1
    assert call(server, "EvalLoss", pb.EvalLossRequest(batch=batch(LOST_ID))) is grpc.StatusCode.UNAVAILABLE
    assert server._reap() == EXIT_DEVICE
    assert "the device has failed (CUDA error: an illegal memory access" in server.log.read_text()
    server.start()
    assert call(server, "TrainStep", step(LOST_ID)) is grpc.StatusCode.UNAVAILABLE
    assert server._reap() == EXIT_DEVICE
    server.start()
    answer = call(server, "TrainStep", step(LOST_ID))
    assert (answer.step, answer.outcome) == (2, pb.STEP_OUTCOME_POISON), "as a batch that kills the process"
    assert call(server, "TrainStep", step(3)).step == 3
    assert server.stop() == 0
