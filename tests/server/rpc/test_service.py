"""The service's own part of a step, around an engine that notes what it is told."""

from __future__ import annotations

import errno
import os
from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.results import Limits
from maskwire_server.rpc.service import TrainingService


class Noting:
    """An engine that takes every step and answers none."""

    limits = Limits(1024, 2**20, 8, 16, 16)

    def __init__(self, info: Any) -> None:
        self._info = info
        self.future: Future[Any] = Future()
        self.refused: list[int | None] = []

    @property
    def info(self) -> Any:
        if isinstance(self._info, Exception):
            raise self._info
        return self._info

    def train_step(self, request: Any) -> Future[Any]:
        return self.future

    def step_refused(self, session: Any, step: int | None) -> None:
        self.refused.append(step)


class Context:
    """A call whose client has gone, or is told its end."""

    def __init__(self, *, gone: bool, left: float | None = None) -> None:
        self._gone, self._left = gone, left

    def add_callback(self, callback: Any) -> bool:
        return not self._gone

    def time_remaining(self) -> float | None:
        return self._left

    def abort_with_status(self, status: Any) -> None:
        raise grpc.RpcError(status.details)


class Said(Context):
    """Keeps the reason that the call ended with."""

    reason = ""

    def abort_with_status(self, status: Any) -> None:
        details = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
        info = error_details_pb2.ErrorInfo()
        details.details[0].Unpack(info)
        self.reason = info.reason
        super().abort_with_status(status)


REQUEST = pb.TrainStepRequest(
    session=pb.SessionRef(run_id="r", lineage=1, epoch=1),
    step=4,
    batch=pb.TokenBatch(data=b"1234", shape=[1, 4], dtype=pb.DATA_TYPE_UINT8),
)


def test_the_engine_is_told_of_a_step_that_fails_before_it_comes_whatever_the_reason() -> None:
    engine = Noting(RuntimeError("nobody thought of it"))
    with pytest.raises(grpc.RpcError, match="unexpected"):
        TrainingService(engine).TrainStep(REQUEST, Context(gone=False))  # type: ignore[arg-type]
    assert engine.refused == [4]


def test_a_step_whose_client_has_gone_already_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Noting(object())
    monkeypatch.setattr("maskwire_server.rpc.decoding.read_step", lambda *_: object())
    with pytest.raises(grpc.RpcError):
        TrainingService(engine).TrainStep(REQUEST, Context(gone=True))  # type: ignore[arg-type]
    assert engine.future.cancelled()
    with pytest.raises(CancelledError):
        engine.future.result()


@pytest.mark.parametrize(
    ("left", "reason"), [(0.0, "DEADLINE_EXCEEDED"), (12.0, "CANCELLED"), (None, "CANCELLED")]
)
def test_a_call_that_its_client_gave_up_is_not_said_to_meet_a_recovery(
    left: float | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Noting(object())
    engine.future.cancel()
    monkeypatch.setattr("maskwire_server.rpc.decoding.read_step", lambda *_: object())
    for gone in (True, False):
        said = Said(gone=gone, left=left)
        with pytest.raises(grpc.RpcError):
            TrainingService(engine).TrainStep(REQUEST, said)  # type: ignore[arg-type]
        assert said.reason == reason


def test_a_want_of_open_files_refuses_the_call_that_met_it() -> None:
    engine = Noting(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    said = Said(gone=False)
    with pytest.raises(grpc.RpcError, match="Too many open files"):
        TrainingService(engine).TrainStep(REQUEST, said)  # type: ignore[arg-type]
    assert said.reason == "OUT_OF_RESOURCES"
