"""A server that applies steps as the protocol says, except for the faults that a test scripts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import maskwire
from maskwire.protocol.codec import hash_of
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire.v1.digest import DigestVersion, step_digest

TOKENS = np.arange(8).reshape(2, 4)
Fault = Callable[[pb.TrainStepRequest, grpc.ServicerContext], None]


def refuse(
    context: grpc.ServicerContext, code: str, reason: str, retry: float | None = None, **metadata: str
) -> None:
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=f"{reason} said the script")
    info = error_details_pb2.ErrorInfo(reason=reason, domain="maskwire", metadata=metadata)
    status.details.add().Pack(info)
    if retry is not None:
        wait = error_details_pb2.RetryInfo()
        wait.retry_delay.FromMilliseconds(int(retry * 1000))
        status.details.add().Pack(wait)
    context.abort_with_status(rpc_status.to_status(status))


class Script(pb_grpc.TrainingServiceServicer):
    """Applies steps as the protocol says, but for the faults that a test puts in their way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.digest, self.step = b"0" * 32, 0
        self.answers: dict[str, pb.TrainStepResponse] = {}
        self.before: list[Fault] = []
        self.after: list[Fault] = []
        self.requests: list[pb.TrainStepRequest] = []
        self.opened: list[pb.OpenSessionRequest] = []
        self.on_open: list[Callable[[grpc.ServicerContext], None]] = []
        self.restored_at: list[int] = []

    def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:  # noqa: N802
        self.opened.append(request)
        if self.on_open:
            self.on_open.pop(0)(context)
        return pb.OpenSessionResponse(
            session=pb.SessionRef(run_id="run", lineage=1, epoch=1),
            step=self.step, durable_step=self.step, digest=self.digest,
            model=pb.ModelInfo(num_tokens=17, mask_id=16, max_seq_len=32), limits=pb.Limits(window=8),
        )  # fmt: skip

    def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:  # noqa: N802
        return pb.CloseSessionResponse()

    def RestoreCheckpoint(self, request: pb.RestoreCheckpointRequest, context: Any) -> Any:  # noqa: N802
        self.restored_at.append(self.step)
        self.step, self.digest = 0, b"1" * 32
        return pb.RestoreCheckpointResponse(lineage=1, step=0, digest=self.digest)

    def TrainStep(self, request: pb.TrainStepRequest, context: Any) -> pb.TrainStepResponse:  # noqa: N802
        with self.lock:
            self.requests.append(request)
            if self.before:
                self.before.pop(0)(request, context)
            if request.request_id not in self.answers:
                if request.step != self.step + 1:
                    refuse(context, "OUT_OF_RANGE", "GAP", expected_step=str(self.step + 1))
                self.step += 1
                self.digest = step_digest(self.digest, 1, self.step, hash_of(request, DigestVersion(1)), 1)
                self.answers[request.request_id] = pb.TrainStepResponse(
                    step=self.step, digest=self.digest, outcome=pb.STEP_OUTCOME_APPLIED,
                    losses=pb.Losses(loss=1.0, generator_loss=1.0),
                )  # fmt: skip
            if self.after:
                self.after.pop(0)(request, context)
            return self.answers[request.request_id]


def connect(script: Script, **options: Any) -> maskwire.Trainer:
    return maskwire.connect(script.target, on_wait=lambda _: None, **options)  # type: ignore[attr-defined]


def lost(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
