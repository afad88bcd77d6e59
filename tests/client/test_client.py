"""The client against a scripted server: what it retries, and when it gives up."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import pytest
from scripted_server import TOKENS, Script, connect, lost, refuse

import maskwire
from maskwire.errors import (
    DigestMismatchError,
    FencedError,
    HistoryLostError,
    InvalidRequestError,
    ServerError,
    UnavailableError,
)
from maskwire.v1 import training_service_pb2 as pb


def test_a_retry_after_a_lost_reply_has_the_same_id_and_applies_the_step_once(script: Script) -> None:
    script.after = [lost, lost]
    with connect(script) as trainer:
        assert trainer.train_step(TOKENS).step == 1
        assert trainer.train_step(TOKENS).step == 2
    first = script.requests[:3]
    assert len({request.request_id for request in first}) == 1
    assert script.requests[3].request_id != first[0].request_id
    assert script.step == 2


def test_a_retry_after_a_lost_request_confirms_the_history_first(script: Script) -> None:
    with connect(script) as trainer:
        trainer.train_step(TOKENS)
        digest = trainer.digest
        script.before = [lost]
        trainer.train_step(TOKENS)
    first, second = script.opened
    assert first.nonce == second.nonce
    assert not first.HasField("history")
    assert second.held_epoch == 1
    assert (second.history.step, second.history.digest, second.history.run_id) == (1, digest, "run")


def test_a_step_that_was_given_up_is_named_to_those_behind_it(script: Script) -> None:
    sent = threading.Event()
    script.before = [lambda *_: sent.wait(20)]
    script.after = [lost]
    with connect(script, retry_for=0) as trainer:
        given_up = trainer.submit(TOKENS)
        while not script.requests:
            time.sleep(0.001)
        behind = trainer.submit(TOKENS)
        while trainer._writer._pending[-1].sent_number != 2:
            time.sleep(0.001)
        sent.set()
        with pytest.raises(UnavailableError, match="did not answer"):
            given_up.result(timeout=20)
        unknown = "step 1 got no answer and may have been applied.*: connect again"
        with pytest.raises(UnavailableError, match=unknown):
            behind.result(timeout=20)
        script.before = [lambda _, context: refuse(context, "ALREADY_EXISTS", "STEP_TAKEN")]
        with pytest.raises(UnavailableError, match=unknown):
            trainer.train_step(TOKENS)


def test_a_lost_history_stops_the_client(script: Script) -> None:
    with connect(script) as trainer:
        trainer.train_step(TOKENS)
        script.before = [lost]
        script.on_open = [lambda context: refuse(context, "DATA_LOSS", "HISTORY_LOST")]
        with pytest.raises(HistoryLostError):
            trainer.train_step(TOKENS)
        assert script.step == 1


def test_a_digest_of_something_else_is_found_at_once(script: Script) -> None:
    with connect(script) as trainer:
        trainer.train_step(TOKENS)
        script.digest = b"x" * 32
        with pytest.raises(DigestMismatchError, match="after step 2"):
            trainer.train_step(TOKENS)


def test_a_step_that_is_refused_leaves_its_number_to_the_next(script: Script) -> None:
    def invalid(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        refuse(context, "INVALID_ARGUMENT", "INVALID_FIELD", field="batch.data")

    with connect(script) as trainer:
        script.before = [invalid]
        with pytest.raises(InvalidRequestError) as raised:
            trainer.train_step(TOKENS)
        assert raised.value.field == "batch.data"
        assert trainer.train_step(TOKENS).step == 1


def test_a_window_keeps_its_order_and_its_bound(script: Script) -> None:
    with connect(script, window=3) as trainer:
        results = [trainer.submit(TOKENS + i) for i in range(12)]
        assert [result.result(timeout=20).step for result in results] == list(range(1, 13))
    assert trainer._writer.in_flight == 0
    assert trainer.step == 12


def test_a_full_queue_is_asked_again_after_what_the_server_says(script: Script) -> None:
    def full(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        refuse(context, "RESOURCE_EXHAUSTED", "QUEUE_FULL", retry=0.01)

    script.before = [full, full]
    with connect(script) as trainer:
        assert trainer.train_step(TOKENS).step == 1
    assert len(script.opened) == 1, "the server was there all the time"


def test_a_fenced_client_stops(script: Script) -> None:
    def fenced(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        refuse(context, "ABORTED", "FENCED")

    with connect(script) as trainer:
        script.before = [fenced]
        with pytest.raises(FencedError):
            trainer.train_step(TOKENS)
        assert len(script.requests) == 1


def test_an_internal_error_is_not_asked_again(script: Script) -> None:
    def internal(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        refuse(context, "INTERNAL", "INTERNAL", error_id="abc")

    with connect(script) as trainer:
        script.before = [internal]
        with pytest.raises(ServerError) as raised:
            trainer.train_step(TOKENS)
        assert raised.value.error_id == "abc"
        assert len(script.requests) == 1


def test_a_server_that_stays_away_is_given_up_with_what_to_do(script: Script) -> None:
    with connect(script, retry_for=0.2) as trainer:
        script.before = [lost] * 50
        with pytest.raises(UnavailableError, match="is the server running"):
            trainer.train_step(TOKENS)
    assert len({request.request_id for request in script.requests}) == 1


def test_a_wait_is_reported_without_the_lock_so_that_the_callback_may_use_the_trainer(script: Script) -> None:
    script.before = [lost, lost]
    submitted: list[Any] = []

    def on_wait(message: str) -> None:
        assert not trainer._lock.locked(), "the callback could not use the trainer"
        submitted.append(trainer.submit(TOKENS))

    with maskwire.connect(script.target, on_wait=on_wait) as trainer:  # type: ignore[attr-defined]
        assert trainer.train_step(TOKENS).step == 1
        assert [future.result(20).step for future in submitted] == [2]


def test_a_closed_trainer_says_so(script: Script) -> None:
    trainer = connect(script)
    trainer.close()
    trainer.close()
    with pytest.raises(maskwire.MaskwireError, match="closed"):
        trainer.train_step(TOKENS)


def test_every_step_of_a_window_gives_up_in_its_own_time(script: Script) -> None:
    with connect(script, retry_for=1.0, window=8) as trainer:
        trainer.train_step(TOKENS)
        script.before = [lost] * 1000
        script.on_open = [lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone")] * 1000
        began = time.monotonic()
        for future in [trainer.submit(TOKENS) for _ in range(8)]:
            with pytest.raises(UnavailableError):
                future.result(timeout=60)
        # One budget each, side by side: not one after another behind the session, which would take 8 s.
        assert time.monotonic() - began < 7.5
        script.before, script.on_open = [], []


def test_a_step_that_waits_for_its_turn_cannot_be_cancelled(script: Script) -> None:
    with connect(script, window=1) as trainer:
        for _ in range(20):
            assert not trainer.submit(TOKENS).cancel()
        trainer.settle()
        assert trainer.step == 20


def test_a_restore_waits_for_the_steps_in_flight_and_later_ones_wait_for_it(script: Script) -> None:
    slow = threading.Event()
    after: list[Any] = []

    def hold(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        slow.wait(10)

    with connect(script, window=4) as trainer:
        script.before = [hold]
        before = [trainer.submit(TOKENS) for _ in range(2)]
        restoring = threading.Thread(target=trainer.restore, args=("a",))
        restoring.start()
        while not trainer._writer._restoring:
            time.sleep(0.001)
        handing_in = threading.Thread(target=lambda: after.append(trainer.submit(TOKENS)))
        handing_in.start()
        slow.set()
        assert [future.result(10).step for future in before] == [1, 2]
        restoring.join()
        handing_in.join()
        assert after[0].result(10).step == 1, "the first of the new lineage"
    assert script.restored_at == [2], "what was in flight came first"


def test_a_server_with_another_history_is_found_out(script: Script) -> None:
    def closed(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        refuse(context, "FAILED_PRECONDITION", "UNKNOWN_EPOCH")

    with connect(script) as trainer:
        trainer.train_step(TOKENS)
        script.before = [closed]
        script.on_open = [lambda context: refuse(context, "DATA_LOSS", "HISTORY_LOST")]
        with pytest.raises(HistoryLostError):
            trainer.train_step(TOKENS)


def test_a_close_with_a_grace_leaves_a_server_that_hangs(script: Script) -> None:
    arrived, over = threading.Event(), threading.Event()

    def hang(request: pb.TrainStepRequest, context: grpc.ServicerContext) -> None:
        arrived.set()
        over.wait(60)

    trainer = connect(script)
    script.before = [hang]
    future = trainer.submit(TOKENS)
    assert arrived.wait(20)
    trainer.close(grace=0.1)
    assert not over.is_set(), "it did not wait for the answer"
    with pytest.raises(UnavailableError):
        future.result(timeout=20)
    over.set()
