"""The table of docs/protocol.md, row by row, each over a real port."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving import ServerProcess

from maskwire.errors import Failure, read_failure
from maskwire.v1 import training_service_pb2 as pb

Serve = Callable[..., ServerProcess]
Stub = Callable[[ServerProcess], Any]
Code = grpc.StatusCode


def request(value: int, **fields: Any) -> pb.TrainStepRequest:
    """Sixteen times one id; 10 and more are harmless to the counter trainer."""
    batch = pb.TokenBatch(data=bytes([value]) * 16, shape=[1, 16], dtype=pb.DATA_TYPE_UINT8)
    return pb.TrainStepRequest(batch=batch, **fields)


def opened(service: Any, name: str = "a", **fields: Any) -> pb.SessionRef:
    return service.OpenSession(
        pb.OpenSessionRequest(client_name=name, nonce=f"{name} {time.monotonic_ns()}", **fields), timeout=20
    ).session


def refused(act: Callable[[], Any], code: grpc.StatusCode, reason: str) -> Failure:
    with pytest.raises(grpc.RpcError) as raised:
        act()
    failure = read_failure(raised.value)
    assert (raised.value.code(), failure.error.reason) == (code, reason), raised.value.details()
    return failure


def applied(service: Any) -> int:
    return service.GetStatus(pb.GetStatusRequest(), timeout=5).durable_step


@pytest.fixture
def service(serve: Serve, stub: Stub) -> Any:
    return stub(serve(seconds=0, serve__gap_seconds="0.3"))


@pytest.fixture
def slow(serve: Serve, stub: Stub) -> Any:
    """A step takes 0.6 s, so that there is time to ask beside it."""
    return stub(serve(seconds=0.6, serve__gap_seconds="0.3"))


def test_wrong_run_or_lineage(service: Any) -> None:
    session = opened(service)
    for other in (
        pb.SessionRef(run_id="another", lineage=session.lineage, epoch=session.epoch),
        pb.SessionRef(run_id=session.run_id, lineage=session.lineage + 1, epoch=session.epoch),
    ):
        refused(
            lambda other=other: service.TrainStep(request(10, session=other)),
            Code.FAILED_PRECONDITION,
            "WRONG_RUN",
        )
    assert applied(service) == 0


def test_the_lineage_that_a_restore_left_behind(service: Any) -> None:
    session = opened(service)
    service.TrainStep(request(10, session=session, step=1))
    service.Checkpoint(pb.CheckpointRequest(name="one"), timeout=20)
    service.TrainStep(request(11, session=session, step=2))
    service.RestoreCheckpoint(pb.RestoreCheckpointRequest(name="one"), timeout=20)
    refused(
        lambda: service.TrainStep(request(12, session=session, step=3)),
        Code.FAILED_PRECONDITION,
        "WRONG_RUN",
    )
    again = opened(service)
    assert (again.lineage, service.TrainStep(request(12, session=again)).step) == (session.lineage + 1, 2)


def test_an_older_and_an_unknown_epoch(service: Any) -> None:
    old = opened(service, "a")
    new = opened(service, "b", takeover=True)
    refused(lambda: service.TrainStep(request(10, session=old)), Code.ABORTED, "FENCED")
    future = pb.SessionRef(run_id=new.run_id, lineage=new.lineage, epoch=new.epoch + 1)
    refused(lambda: service.TrainStep(request(10, session=future)), Code.FAILED_PRECONDITION, "UNKNOWN_EPOCH")
    service.CloseSession(pb.CloseSessionRequest(session=new))
    refused(lambda: service.TrainStep(request(10, session=new)), Code.FAILED_PRECONDITION, "UNKNOWN_EPOCH")
    assert service.TrainStep(request(10)).step == 1, "nobody writes: the bare call works again"


def test_a_bare_call_while_a_writer_is_there(service: Any) -> None:
    opened(service, "the writer")
    failure = refused(lambda: service.TrainStep(request(10)), Code.FAILED_PRECONDITION, "WRITER_PRESENT")
    assert "the writer" in str(failure.error)


@pytest.mark.parametrize("again", [None, 1], ids=["without its step", "with its step"])
def test_a_known_request_is_answered_from_the_record(service: Any, again: int | None) -> None:
    first = service.TrainStep(request(10, request_id="known", step=1))
    later = service.TrainStep(request(10, request_id="known", step=again))
    assert (first.replayed, later.replayed) == (False, True)
    assert (later.step, later.losses, later.digest) == (first.step, first.losses, first.digest)
    assert applied(service) == 1


def test_a_known_request_in_flight_is_joined(slow: Any) -> None:
    first = slow.TrainStep.future(request(10, request_id="known"))
    time.sleep(0.2)
    second = slow.TrainStep.future(request(10, request_id="known"))
    assert first.result(timeout=10).step == second.result(timeout=10).step == 1
    assert first.result().losses == second.result().losses
    assert applied(slow) == 1


def test_a_joined_step_outlives_its_first_caller(slow: Any) -> None:
    before = [slow.TrainStep.future(request(value)) for value in (11, 12)]
    first = slow.TrainStep.future(request(10, request_id="known"))
    time.sleep(0.1)
    second = slow.TrainStep.future(request(10, request_id="known"))
    time.sleep(0.1)
    first.cancel()
    assert {call.result(timeout=10).step for call in (*before, second)} == {1, 2, 3}


@pytest.mark.parametrize("wait", [0.2, 1.2], ids=["in flight", "recorded"])
def test_a_known_request_with_another_hash_or_step(slow: Any, wait: float) -> None:
    first = slow.TrainStep.future(request(10, request_id="known", step=1))
    time.sleep(wait)
    for other in (
        request(11, request_id="known", step=1),
        request(10, request_id="known", step=2),
        request(10, request_id="known", step=1, only_train_generator=True),
    ):
        refused(lambda other=other: slow.TrainStep(other), Code.INVALID_ARGUMENT, "PAYLOAD_MISMATCH")
    assert first.result(timeout=10).step == 1
    assert applied(slow) == 1


def test_a_step_that_is_applied_or_in_flight_under_another_id(slow: Any) -> None:
    first = slow.TrainStep.future(request(10, request_id="one", step=1))
    time.sleep(0.2)
    refused(lambda: slow.TrainStep(request(11, request_id="two", step=1)), Code.ALREADY_EXISTS, "STEP_TAKEN")
    ahead = slow.TrainStep.future(request(12, request_id="three", step=3))
    time.sleep(0.1)
    refused(lambda: slow.TrainStep(request(13, request_id="four", step=3)), Code.ALREADY_EXISTS, "STEP_TAKEN")
    refused(ahead.result, Code.OUT_OF_RANGE, "GAP")
    assert first.result(timeout=10).step == 1
    refused(lambda: slow.TrainStep(request(14, request_id="five", step=1)), Code.ALREADY_EXISTS, "STEP_TAKEN")


@pytest.mark.parametrize("step", [None, 1], ids=["no step", "the next step"])
def test_the_next_step_runs(service: Any, step: int | None) -> None:
    assert service.TrainStep(request(10, step=step)).step == 1


def test_a_step_ahead_within_the_window_waits(slow: Any) -> None:
    late = [slow.TrainStep.future(request(10 + step, step=step)) for step in (3, 2)]
    time.sleep(0.1)
    assert slow.TrainStep(request(11, step=1)).step == 1
    assert [call.result(timeout=10).step for call in late] == [3, 2]


def test_a_predecessor_that_stays_away_is_a_gap_after_a_while(service: Any) -> None:
    began = time.monotonic()
    failure = refused(lambda: service.TrainStep(request(10, step=2)), Code.OUT_OF_RANGE, "GAP")
    assert time.monotonic() - began >= 0.3
    assert failure.error.metadata["expected_step"] == "1"


def test_a_refused_predecessor_is_a_gap_at_once(serve: Serve, stub: Stub) -> None:
    service = stub(serve(seconds=0, serve__gap_seconds="600"))
    session = opened(service)
    ahead = service.TrainStep.future(request(10, session=session, step=2))
    time.sleep(0.1)
    bad = pb.TrainStepRequest(session=session, step=1, batch=pb.TokenBatch(shape=[1, 0], dtype=1))
    refused(lambda: service.TrainStep(bad), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    refused(lambda: ahead.result(timeout=10), Code.OUT_OF_RANGE, "GAP")
    refused(lambda: service.TrainStep(request(11, session=session, step=2)), Code.OUT_OF_RANGE, "GAP")
    assert service.TrainStep(request(10, session=session, step=1)).step == 1


def test_an_expired_predecessor_is_a_gap(slow: Any) -> None:
    session = opened(slow)
    running = slow.TrainStep.future(request(10, session=session, step=1))
    second = slow.TrainStep.future(request(11, session=session, step=2))
    expired = slow.TrainStep.future(request(12, session=session, step=3), timeout=0.2)
    behind = slow.TrainStep.future(request(13, session=session, step=4))
    assert running.result(timeout=10).step == 1
    assert second.result(timeout=10).step == 2
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        expired.result()
    refused(lambda: behind.result(timeout=10), Code.OUT_OF_RANGE, "GAP")
    assert applied(slow) == 2


def test_a_step_beyond_the_window_is_a_gap_at_once(serve: Serve, stub: Stub) -> None:
    service = stub(serve(seconds=0, serve__gap_seconds="600", serve__window="4"))
    for step in (5, 6, 10**12):
        failure = refused(
            lambda step=step: service.TrainStep(request(10, step=step), timeout=10), Code.OUT_OF_RANGE, "GAP"
        )
        assert failure.error.metadata["expected_step"] == "1"


def test_a_full_queue(serve: Serve, stub: Stub) -> None:
    service = stub(serve(seconds=0.5, serve__queue_limit="1"))
    calls = [service.TrainStep.future(request(10 + i)) for i in range(3)]  # two at the device, one waits
    time.sleep(0.2)
    failure = refused(lambda: service.TrainStep(request(20)), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert failure.retryable
    assert failure.retry_after
    assert sorted(call.result(timeout=10).step for call in calls) == [1, 2, 3]


def test_recovering(serve: Serve, stub: Stub) -> None:
    # A step takes half a second, also when it is replayed.
    server = serve(seconds=0.5, checkpoints__every_seconds="1e6")
    for step in range(1, 5):
        stub(server).TrainStep(request(10 + step, request_id=f"r{step}", step=step))
    server.kill()
    server._command.append(f"--set=serve.address={server.address}")
    with starting(server) as process:
        service = stub(server)
        await_state(service, pb.RUN_STATE_RECOVERING)
        failure = refused(lambda: service.TrainStep(request(20)), Code.UNAVAILABLE, "RECOVERING")
        assert failure.retryable
        assert failure.retry_after
        assert process.stdout is not None
        process.stdout.readline()
        assert service.TrainStep(request(14, request_id="r4", step=4)).replayed
        assert service.TrainStep(request(20)).step == 5


def test_restoring(serve: Serve, stub: Stub) -> None:
    service = stub(serve(seconds=0.8))
    service.Checkpoint(pb.CheckpointRequest(name="start"), timeout=20)
    running = service.TrainStep.future(request(10))
    time.sleep(0.2)
    restoring = service.RestoreCheckpoint.future(pb.RestoreCheckpointRequest(name="start"), timeout=20)
    await_state(service, pb.RUN_STATE_RESTORING)
    failure = refused(lambda: service.TrainStep(request(11)), Code.UNAVAILABLE, "RESTORING")
    assert failure.retryable
    assert running.result(timeout=10).step == 1
    assert restoring.result().lineage == 2
    assert service.TrainStep(request(11)).step == 1


def test_draining(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=1.5)
    service = stub(server)
    running = service.TrainStep.future(request(10))
    time.sleep(0.3)
    server.process.terminate()
    await_state(service, pb.RUN_STATE_DRAINING)
    failure = refused(lambda: service.TrainStep(request(11)), Code.UNAVAILABLE, "DRAINING")
    assert failure.retryable
    assert running.result(timeout=10).step == 1
    assert server._reap() == 0


def test_held(serve: Serve, stub: Stub) -> None:
    # A reserve larger than any disk: no step may begin.
    service = stub(serve(seconds=0, serve__reserve_bytes=str(2**60)))
    failure = refused(lambda: service.TrainStep(request(10)), Code.UNAVAILABLE, "HELD")
    assert failure.retryable
    assert failure.retry_after
    assert service.GetStatus(pb.GetStatusRequest()).state == pb.RUN_STATE_HELD
    assert applied(service) == 0


def test_halted(service: Any) -> None:
    for _ in range(3):
        assert service.TrainStep(request(7)).outcome == pb.STEP_OUTCOME_SKIPPED_NON_FINITE
    failure = refused(lambda: service.TrainStep(request(10)), Code.FAILED_PRECONDITION, "HALTED")
    assert not failure.retryable
    session = opened(service, "operator", takeover=True)
    assert service.TrainStep(request(10, session=session)).step == 4


@contextlib.contextmanager
def starting(server: ServerProcess) -> Iterator[subprocess.Popen[str]]:
    with (Path(server.folder) / "server.log").open("a") as log:
        process = subprocess.Popen(server._command, stdout=subprocess.PIPE, stderr=log, text=True)
    server.process = process
    yield process


def await_state(service: Any, state: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            if service.GetStatus(pb.GetStatusRequest(), timeout=1, wait_for_ready=True).state == state:
                return
        time.sleep(0.02)
    pytest.fail(f"the state never was {pb.RunState.Name(state)}")
