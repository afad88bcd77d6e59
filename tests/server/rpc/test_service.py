"""The service's own part of a step, around an engine that notes what it is told."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
import pytest

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

    def __init__(self, *, gone: bool) -> None:
        self._gone = gone

    def add_callback(self, callback: Any) -> bool:
        return not self._gone

    def abort_with_status(self, status: Any) -> None:
        raise grpc.RpcError(status.details)


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
    monkeypatch.setattr("maskwire_server.rpc.wire.read_step", lambda *_: object())
    with pytest.raises(grpc.RpcError):
        TrainingService(engine).TrainStep(REQUEST, Context(gone=True))  # type: ignore[arg-type]
    assert engine.future.cancelled()
    with pytest.raises(CancelledError):
        engine.future.result()
