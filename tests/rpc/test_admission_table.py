"""The table of docs/protocol.md, row by row, each over a real port."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import grpc
import pytest
from serving import WAIT, ServerProcess, health, wait_until

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
        pb.OpenSessionRequest(
            client_name=name, nonce=f"{name} {time.monotonic_ns()}", digest_versions=[1, 2], **fields
        ),
        timeout=20,
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
def held(serve: Serve) -> ServerProcess:
    """Its steps begin and wait for `release`, so that there is time to ask beside them."""
    return serve(held=True, serve__gap_seconds="600")


def test_a_client_that_lacks_the_version_of_the_digest(service: Any) -> None:
    def status() -> int:
        return int(service.GetStatus(pb.GetStatusRequest(), timeout=5).digest_version)

    def open_session(name: str, *versions: int) -> pb.OpenSessionResponse:
        return service.OpenSession(  # type: ignore[no-any-return]
            pb.OpenSessionRequest(client_name=name, nonce=name, takeover=True, digest_versions=versions),
            timeout=20,
        )

    assert open_session("a").digest_version == 1, "which says nothing computes version 1"
    newer = open_session("b", 1, 2)
    assert (newer.digest_version, status()) == (2, 0)
    service.TrainStep(request(10, session=newer.session, step=1), timeout=20)
    assert status() == 2
    failure = refused(lambda: open_session("c"), Code.FAILED_PRECONDITION, "DIGEST_VERSION")
    assert failure.error.metadata == {"digest_version": "2", "client_digest_versions": "1"}
    assert not failure.retryable
    many = range(1, 18)
    refused(lambda: open_session("d", *many), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    service.TrainStep(request(11, session=newer.session, step=2), timeout=20)


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


def test_a_known_request_in_flight_is_joined(held: ServerProcess, stub: Stub) -> None:
    service = stub(held)
    first = service.TrainStep.future(request(10, request_id="known"))
    held.wait_for_step()
    second = service.TrainStep.future(request(10, request_id="known"))
    held.wait_for_arrivals(2)
    held.release()
    assert first.result(timeout=WAIT).step == second.result(timeout=WAIT).step == 1
    assert first.result().losses == second.result().losses
    assert applied(service) == 1


def test_a_joined_step_outlives_its_first_caller(held: ServerProcess, stub: Stub) -> None:
    service = stub(held)
    before = [service.TrainStep.future(request(value)) for value in (11, 12)]
    held.wait_for_arrivals(2)
    first = service.TrainStep.future(request(10, request_id="known"))
    held.wait_for_arrivals(3)
    second = service.TrainStep.future(request(10, request_id="known"))
    held.wait_for_arrivals(4)
    first.cancel()
    assert applied(service) == 0, "an answer that came behind the cancellation"
    held.release()
    assert {call.result(timeout=WAIT).step for call in (*before, second)} == {1, 2, 3}


@pytest.mark.parametrize("when", ["in flight", "recorded"])
def test_a_known_request_with_another_hash_or_step(held: ServerProcess, stub: Stub, when: str) -> None:
    service = stub(held)
    first = service.TrainStep.future(request(10, request_id="known", step=1))
    held.wait_for_step()
    if when == "recorded":
        held.release()
        assert first.result(timeout=WAIT).step == 1
    for other in (
        request(11, request_id="known", step=1),
        request(10, request_id="known", step=2),
        request(10, request_id="known", step=1, only_train_generator=True),
    ):
        refused(lambda other=other: service.TrainStep(other), Code.INVALID_ARGUMENT, "PAYLOAD_MISMATCH")
    if when == "in flight":
        held.release()
    assert first.result(timeout=WAIT).step == 1
    assert applied(service) == 1


def test_a_step_that_is_applied_or_in_flight_under_another_id(held: ServerProcess, stub: Stub) -> None:
    service = stub(held)

    def taken(value: int, name: str, step: int) -> None:
        asked = request(value, request_id=name, step=step)
        refused(lambda: service.TrainStep(asked), Code.ALREADY_EXISTS, "STEP_TAKEN")

    first = service.TrainStep.future(request(10, request_id="one", step=1))
    held.wait_for_step()
    taken(11, "two", 1)
    ahead = service.TrainStep.future(request(12, request_id="three", step=3))
    held.wait_for_arrivals(3)
    taken(13, "four", 3)
    held.release()
    assert first.result(timeout=WAIT).step == 1
    taken(14, "five", 1)
    assert service.TrainStep(request(15, step=2)).step == 2
    assert ahead.result(timeout=WAIT).step == 3
    taken(16, "six", 3)


@pytest.mark.parametrize("step", [None, 1], ids=["no step", "the next step"])
def test_the_next_step_runs(service: Any, step: int | None) -> None:
    assert service.TrainStep(request(10, step=step)).step == 1


def test_a_step_ahead_within_the_window_waits(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0, serve__gap_seconds="600")
    service = stub(server)
    late = [service.TrainStep.future(request(10 + step, step=step)) for step in (3, 2)]
    server.wait_for_arrivals(2)
    assert service.TrainStep(request(11, step=1)).step == 1
    assert [call.result(timeout=WAIT).step for call in late] == [3, 2]


def test_a_predecessor_that_stays_away_is_a_gap_after_a_while(service: Any) -> None:
    began = time.monotonic()
    failure = refused(lambda: service.TrainStep(request(10, step=2)), Code.OUT_OF_RANGE, "GAP")
    assert time.monotonic() - began >= 0.3
    assert failure.error.metadata["expected_step"] == "1"


def test_a_refused_predecessor_is_a_gap_at_once(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0, serve__gap_seconds="600")
    service = stub(server)
    session = opened(service)
    ahead = service.TrainStep.future(request(10, session=session, step=2))
    server.wait_for_arrivals(1)
    bad = pb.TrainStepRequest(session=session, step=1, batch=pb.TokenBatch(shape=[1, 0], dtype=1))
    refused(lambda: service.TrainStep(bad), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    refused(lambda: ahead.result(timeout=WAIT), Code.OUT_OF_RANGE, "GAP")
    refused(lambda: service.TrainStep(request(11, session=session, step=2)), Code.OUT_OF_RANGE, "GAP")
    assert service.TrainStep(request(10, session=session, step=1)).step == 1


def test_an_expired_predecessor_is_a_gap(serve: Serve, stub: Stub) -> None:
    server = serve(held=True, serve__gap_seconds="0.3")
    service = stub(server)
    session = opened(service)
    running = service.TrainStep.future(request(10, session=session, step=1))
    server.wait_for_step()
    second = service.TrainStep.future(request(11, session=session, step=2))
    server.wait_for_arrivals(2)
    expired = service.TrainStep.future(request(12, session=session, step=3), timeout=0.5)
    behind = service.TrainStep.future(request(13, session=session, step=4))
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        expired.result()
    applied(service)  # a later call on the same channel: the server has heard of the end of this one
    server.release()
    assert running.result(timeout=WAIT).step == 1
    assert second.result(timeout=WAIT).step == 2
    refused(lambda: behind.result(timeout=WAIT), Code.OUT_OF_RANGE, "GAP")
    assert applied(service) == 2


def test_a_step_beyond_the_window_is_a_gap_at_once(serve: Serve, stub: Stub) -> None:
    service = stub(serve(seconds=0, serve__gap_seconds="600", serve__window="4"))
    for step in (5, 6, 10**12):
        failure = refused(
            lambda step=step: service.TrainStep(request(10, step=step), timeout=10), Code.OUT_OF_RANGE, "GAP"
        )
        assert failure.error.metadata["expected_step"] == "1"


def test_a_full_queue(serve: Serve, stub: Stub) -> None:
    server = serve(held=True, serve__queue_limit="1")
    service = stub(server)
    calls = [service.TrainStep.future(request(10))]
    server.wait_for_step()
    calls.append(service.TrainStep.future(request(11)))
    wait_until(lambda: queue_length(service) == 1, "the queue's length")
    failure = refused(lambda: service.TrainStep(request(20)), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    server.release()
    assert failure.retryable
    assert failure.retry_after
    assert sorted(call.result(timeout=WAIT).step for call in calls) == [1, 2]


def queue_length(service: Any) -> int:
    return service.GetStatus(pb.GetStatusRequest()).queue_length


def test_recovering(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0, checkpoints__every_seconds="1e6")
    for step in range(1, 5):
        stub(server).TrainStep(request(10 + step, request_id=f"r{step}", step=step))
    server.kill()
    server._command.append(f"--set=serve.address={server.address}")
    server.hold()  # a step that is replayed is held too
    with starting(server) as process:
        service = stub(server)
        await_state(service, pb.RUN_STATE_RECOVERING)
        assert health(server.address) == (False, False, True)
        failure = refused(lambda: service.TrainStep(request(20)), Code.UNAVAILABLE, "RECOVERING")
        assert failure.retryable
        assert failure.retry_after
        server.release()
        assert process.stdout is not None
        process.stdout.readline()
        assert service.TrainStep(request(14, request_id="r4", step=4)).replayed
        assert service.TrainStep(request(20)).step == 5


def test_restoring(serve: Serve, stub: Stub) -> None:
    server = serve(held=True)
    service = stub(server)
    service.Checkpoint(pb.CheckpointRequest(name="start"), timeout=WAIT)
    running = service.TrainStep.future(request(10))
    server.wait_for_step()
    restoring = service.RestoreCheckpoint.future(pb.RestoreCheckpointRequest(name="start"), timeout=WAIT)
    await_state(service, pb.RUN_STATE_RESTORING)
    failure = refused(lambda: service.TrainStep(request(11)), Code.UNAVAILABLE, "RESTORING")
    assert failure.retryable
    assert failure.retry_after
    server.release()
    assert running.result(timeout=WAIT).step == 1
    assert restoring.result().lineage == 2
    assert service.TrainStep(request(11)).step == 1


def test_draining(serve: Serve, stub: Stub) -> None:
    server = serve(held=True)
    service = stub(server)
    running = service.TrainStep.future(request(10))
    server.wait_for_step()
    server.process.terminate()
    await_state(service, pb.RUN_STATE_DRAINING)
    wait_until(lambda: health(server.address) == (False, False, True), "the health of a drain")
    failure = refused(lambda: service.TrainStep(request(11)), Code.UNAVAILABLE, "DRAINING")
    assert failure.retryable
    assert failure.retry_after
    server.release()
    assert running.result(timeout=WAIT).step == 1
    assert server._reap() == 0


def test_held(serve: Serve, stub: Stub) -> None:
    # A reserve larger than any disk: no step may begin.
    server = serve(seconds=0, serve__reserve_bytes=str(2**60))
    service = stub(server)
    assert health(server.address) == (True, True, True)
    failure = refused(lambda: service.TrainStep(request(10)), Code.UNAVAILABLE, "HELD")
    assert failure.retryable
    assert failure.retry_after
    assert service.GetStatus(pb.GetStatusRequest()).state == pb.RUN_STATE_HELD
    assert health(server.address) == (False, False, True)
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
        process = fork_server.Process(server._command, stdout=subprocess.PIPE, stderr=log, text=True)
    server.process = process
    yield process


def await_state(service: Any, state: int) -> None:
    def there() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return service.GetStatus(pb.GetStatusRequest(), timeout=5, wait_for_ready=True).state == state
        return False

    wait_until(there, pb.RunState.Name(state))
