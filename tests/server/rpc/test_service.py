"""The service with an engine that records its calls: cancelled calls, unexpected errors, limits."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits
from maskwire_server.rpc.service import MAX_LISTS, TrainingService


class RecordingEngine:
    """An engine that admits every step and answers none."""

    limits = Limits(1024, 2**20, 8, 16, 16)

    def __init__(self, info: Any) -> None:
        self._info = info
        self.future: Future[Any] = Future()
        self.refused: list[int | None] = []
        self.listing = threading.Semaphore(0)
        """Released for each list of steps that is requested."""

    @property
    def info(self) -> Any:
        if isinstance(self._info, Exception):
            raise self._info
        return self._info

    def train_step(self, request: Any) -> Future[Any]:
        return self.future

    def list_steps(self, request: Any) -> Future[Any]:
        self.listing.release()
        return self.future

    def step_refused(self, session: Any, step: int | None) -> None:
        self.refused.append(step)


class Context:
    """A call, ended already or not, that raises the status that it is aborted with."""

    def __init__(self, *, ended: bool, seconds_left: float | None = None) -> None:
        self._ended, self._seconds_left = ended, seconds_left

    def add_callback(self, callback: Any) -> bool:
        return not self._ended

    def time_remaining(self) -> float | None:
        return self._seconds_left

    def abort_with_status(self, status: Any) -> None:
        raise grpc.RpcError(status.details)


class RecordingContext(Context):
    """Records the reason that the call is aborted with."""

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


def test_the_engine_is_told_of_a_step_that_the_service_refuses_for_any_error() -> None:
    engine = RecordingEngine(RuntimeError("unforeseen"))
    with pytest.raises(grpc.RpcError, match="unexpected"):
        TrainingService(engine).TrainStep(REQUEST, Context(ended=False))  # type: ignore[arg-type]
    assert engine.refused == [4]


def test_a_step_whose_call_has_already_ended_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RecordingEngine(object())
    monkeypatch.setattr("maskwire_server.rpc.decoding.read_step", lambda *_: object())
    with pytest.raises(grpc.RpcError):
        TrainingService(engine).TrainStep(REQUEST, Context(ended=True))  # type: ignore[arg-type]
    assert engine.future.cancelled()
    with pytest.raises(CancelledError):
        engine.future.result()


@pytest.mark.parametrize(
    ("seconds_left", "reason"), [(0.0, "DEADLINE_EXCEEDED"), (12.0, "CANCELLED"), (None, "CANCELLED")]
)
def test_a_cancelled_call_ends_with_deadline_exceeded_or_cancelled(
    seconds_left: float | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = RecordingEngine(object())
    engine.future.cancel()
    monkeypatch.setattr("maskwire_server.rpc.decoding.read_step", lambda *_: object())
    for ended in (True, False):
        aborted = RecordingContext(ended=ended, seconds_left=seconds_left)
        with pytest.raises(grpc.RpcError):
            TrainingService(engine).TrainStep(REQUEST, aborted)  # type: ignore[arg-type]
        assert aborted.reason == reason


def test_a_call_that_runs_out_of_open_files_is_refused_with_out_of_resources() -> None:
    engine = RecordingEngine(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    aborted = RecordingContext(ended=False)
    with pytest.raises(grpc.RpcError, match="Too many open files"):
        TrainingService(engine).TrainStep(REQUEST, aborted)  # type: ignore[arg-type]
    assert aborted.reason == "OUT_OF_RESOURCES"


def test_a_list_of_steps_keeps_its_slot_until_it_is_answered_or_cancelled() -> None:
    engine = RecordingEngine(object())
    service = TrainingService(engine)  # type: ignore[arg-type]
    with ThreadPoolExecutor(MAX_LISTS) as pool:
        for _ in range(MAX_LISTS):
            pool.submit(service.ListSteps, pb.ListStepsRequest(), Context(ended=False))  # type: ignore[arg-type]
        engine.listing.acquire()  # of the first; the others wait for their turn
        while service._lists._slots._value > 0:  # type: ignore[attr-defined]
            time.sleep(0.005)
        refused = RecordingContext(ended=False)
        with pytest.raises(grpc.RpcError, match="limit of 2 lists of steps at a time is reached"):
            service.ListSteps(pb.ListStepsRequest(), refused)  # type: ignore[arg-type]
        assert refused.reason == "QUEUE_FULL"
        engine.future.cancel()
    after = RecordingContext(ended=False)
    with pytest.raises(grpc.RpcError):
        service.ListSteps(pb.ListStepsRequest(), after)  # type: ignore[arg-type]
    assert after.reason == "CANCELLED", "admitted, and answered by the cancelled future"
