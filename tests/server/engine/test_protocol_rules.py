"""What the protocol says of a step's identity, of work ahead of the disk, and of takeovers, rule by rule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from counter import NAN_ID
from rig import WAIT, FullDisk, Rig, bare, open_session, payload, reason, slow_disk, wait_for

from maskwire.v1.digest import DigestVersion, step_digest
from maskwire.v1.values import RunState
from maskwire_server.batch import Batch, Modes, Payload, Prompts
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import SessionOpening
from maskwire_server.errors import Refused
from maskwire_server.journal import reserve
from maskwire_server.journal.journal import Journal
from maskwire_server.requests import EvalRequest, GenerateRequest, SessionRequest, StepRequest
from maskwire_server.results import EvalOptions, GenerateAnswer, GenerateOptions


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What admission asks the journal about steps."""
    asked: list[Any] = []
    read = Committer.read

    def noting(self: Committer, question: Any, *arguments: Any) -> Any:
        if question in (Journal.step, Journal.step_of_request):
            asked.append((question.__name__, *arguments))
        return read(self, question, *arguments)

    monkeypatch.setattr(Committer, "read", noting)
    return asked


def test_the_next_step_of_a_session_asks_the_journal_nothing(rig: Rig, questions: list[Any]) -> None:
    engine = rig.start()
    session = open_session(engine)
    for step in (1, 2, 3):
        engine.train_step(StepRequest(payload(step), session, step, f"id {step}")).result(WAIT)
    assert questions == []


def test_a_request_without_a_step_is_looked_up_by_its_id(rig: Rig, questions: list[Any]) -> None:
    engine = rig.start()
    session = open_session(engine)
    engine.train_step(StepRequest(payload(1), session, None, "one")).result(WAIT)
    assert engine.train_step(StepRequest(payload(1), session, None, "one")).result(WAIT).replayed
    assert questions == [("step_of_request", "one")] * 2


def test_a_recorded_step_of_a_session_is_compared_by_id_and_then_by_hash(
    rig: Rig, questions: list[Any]
) -> None:
    engine = rig.start()
    session = open_session(engine)
    first = engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)

    def again(seed: int, request_id: str | None) -> Any:
        return engine.train_step(StepRequest(payload(seed), session, 1, request_id))

    for request_id in ("one", None):
        answer = again(1, request_id).result(WAIT)
        assert (answer.replayed, answer.step, answer.digest) == (True, 1, first.digest)
    assert reason(again(2, "one")) == "PAYLOAD_MISMATCH"
    assert reason(again(1, "another")) == "STEP_TAKEN"
    assert reason(again(2, None)) == "STEP_TAKEN"
    assert questions == [("step", 1, 1)] * 5


def test_an_id_that_another_step_has_is_refused_without_a_look_up(rig: Rig, questions: list[Any]) -> None:
    engine = rig.start()
    session = open_session(engine)
    engine.train_step(StepRequest(payload(1), session, 1, "the same")).result(WAIT)
    assert reason(engine.train_step(StepRequest(payload(1), session, 2, "the same"))) == "PAYLOAD_MISMATCH"
    assert questions == []


def test_a_restarted_server_remembers_no_ids_and_its_journal_takes_one_twice(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine)
    engine.train_step(StepRequest(payload(1), session, 1, "the same")).result(WAIT)
    engine.close()
    engine = rig.start()
    answer = engine.train_step(StepRequest(payload(2), session, 2, "the same")).result(WAIT)
    assert (answer.step, answer.replayed) == (2, False)
    assert engine.train_step(StepRequest(payload(2), session, 2, "the same")).result(WAIT).replayed


def test_a_retry_joins_while_the_journal_is_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    asked, answered = threading.Event(), threading.Event()
    look_up = Journal.step_of_request

    def waiting(self: Journal, request_id: str) -> Any:
        asked.set()
        assert answered.wait(WAIT)
        return look_up(self, request_id)

    monkeypatch.setattr(Journal, "step_of_request", waiting)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(engine.train_step(bare(1, "one")).result(WAIT)))
    first.start()
    assert asked.wait(WAIT)
    twin = engine.train_step(bare(1, "one"))  # returns while the question is open
    assert reason(engine.train_step(bare(2, "one"))) == "PAYLOAD_MISMATCH"
    answered.set()
    first.join(WAIT)
    assert twin.result(WAIT) == answers[0]
    assert engine.status().step == 1


def test_recorded_answers_are_given_while_the_disk_is_full(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    session = open_session(engine)
    engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)

    def full(self: Journal, write: Callable[[], object]) -> None:
        raise FullDisk("database or disk is full")

    monkeypatch.setattr(Journal, "transaction", full)
    engine.train_step(StepRequest(payload(2), session, 2, "two"))
    wait_for(lambda: engine.status().state is RunState.HELD)
    assert engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT).replayed
    assert engine.train_step(StepRequest(payload(1), session, None, "one")).result(WAIT).replayed


def test_no_more_steps_than_the_window_are_ahead_of_the_disk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(serve={"window": 3})
    with slow_disk(monkeypatch) as flush:
        futures = [engine.train_step(bare(i)) for i in range(6)]
        wait_for(lambda: engine.status().step == 3)
        time.sleep(0.05)  # in which a fourth would be computed
        assert engine.status().step == 3
        assert (engine.status().durable_step, engine.status().queue_length) == (0, 3)
        assert not any(future.done() for future in futures)
        flush()
        assert [future.result(WAIT).step for future in futures] == [1, 2, 3, 4, 5, 6]


def test_the_batches_of_uncommitted_steps_count_twice_where_room_is_checked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(payload(0).encode())
    engine = rig.start(serve={"window": 8, "reserve_bytes": 0})
    with slow_disk(monkeypatch) as flush:
        room = engine._committer._journal.log_bytes() + 2 * 3 * size  # for three of them
        monkeypatch.setattr(reserve, "free_bytes", lambda _: room)
        futures = [engine.train_step(bare(i)) for i in range(5)]
        wait_for(lambda: engine.status().step == 3)
        assert engine.status().queue_length == 2
        monkeypatch.setattr(reserve, "free_bytes", lambda _: 2**30)
        flush()
        assert [future.result(WAIT).step for future in futures] == [1, 2, 3, 4, 5]


def test_what_is_read_is_shown_once_the_steps_it_saw_are_durable(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    with slow_disk(monkeypatch) as flush:
        step = engine.train_step(bare(1))
        wait_for(lambda: engine.status().step == 1)
        evaluation = engine.eval_loss(EvalRequest(payload(1).batch, EvalOptions(row_ids=(0, 1))))
        wait_for(lambda: engine.status().queue_length == 0)
        assert not step.done()
        assert not evaluation.done()
        flush()
        answer = evaluation.result(WAIT)
        assert (answer.step, answer.digest) == (1, step.result(WAIT).digest)


def test_what_is_generated_is_shown_once_the_step_it_saw_is_durable(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, shown = rig.start(), threading.Event()
    answers: list[GenerateAnswer] = []
    with slow_disk(monkeypatch) as flush:
        step = engine.train_step(bare(1))
        wait_for(lambda: engine.status().step == 1)
        wanted = GenerateRequest(Prompts.nothing(2, 4), GenerateOptions((0, 1)), every_step=True)
        generation = engine.generate(wanted)
        wait_for(lambda: rig.trainer.passes == 4)

        def read() -> None:
            for answer in generation:
                answers.append(answer)
                shown.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert not shown.wait(0.1)
        assert not step.done()
        flush()
        reader.join(WAIT)
        digest = step.result(WAIT).digest
    assert [(answer.step, answer.digest) for answer in answers] == [(1, digest)] * 4


def test_a_superseded_nonce_is_used_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    first = engine.open_session(SessionRequest("first", "n1"))
    second = engine.open_session(SessionRequest("second", "n2", takeover=True))
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 1
    assert reason(first) == "FENCED"
    assert second.result(WAIT).epoch == 2
    assert reason(engine.open_session(SessionRequest("first", "n1"))) == "FENCED"
    engine.close()
    again = rig.start()
    assert reason(again.open_session(SessionRequest("first", "n1", takeover=True))) == "FENCED"
    assert again.status().epoch == 2


def test_a_session_that_was_closed_stays_closed_after_a_restart(rig: Rig) -> None:
    engine = rig.start()
    engine.close_session(open_session(engine, "me", "n")).result(WAIT)
    engine.close()
    again = rig.start()
    assert again.train_step(bare(1)).result(WAIT).step == 1
    assert reason(again.open_session(SessionRequest("me", "n"))) == "UNKNOWN_EPOCH"


def test_a_takeover_goes_before_everything_that_waits(rig: Rig) -> None:
    engine = rig.start()
    old = open_session(engine, "old", "n1")
    rig.trainer.gate.clear()
    steps = [engine.train_step(StepRequest(payload(n), old, n)) for n in (1, 2)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    evaluation = engine.eval_loss(EvalRequest(payload(1).batch, EvalOptions(row_ids=(0, 1))))
    new = engine.open_session(SessionRequest("new", "n2", takeover=True))
    assert reason(steps[1]) == "FENCED", "at once, while the first runs"
    assert isinstance(engine._run.queue.first(), SessionOpening)
    rig.trainer.gate.set()
    assert steps[0].result(WAIT).step == 1
    assert new.result(WAIT).step == 1
    assert evaluation.result(WAIT).step == 1
    with pytest.raises(Refused, match="took over"):
        engine.train_step(StepRequest(payload(2), old, 2)).result(WAIT)


def test_the_digest_follows_the_outcome(rig: Rig) -> None:
    engine = rig.start()
    before = engine.status().digest
    request = bare(1, first=NAN_ID)
    answer = engine.train_step(request).result(WAIT)
    payload_hash = request.payload.hash(DigestVersion(2, 257))
    assert answer.digest == step_digest(before, 1, 1, payload_hash, int(answer.result.outcome))
    assert np.isnan(answer.result.losses.loss)


def test_a_number_refused_at_admission_is_refused_to_those_behind_it_too(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 600})
    session = open_session(engine, digest_versions=(1,))
    behind = engine.train_step(StepRequest(payload(2), session, 2, "b"))
    ids = payload(1).batch.ids
    packed = Payload(Batch(ids, *ids.shape, segment_ids=np.zeros(ids.size, np.int32)), Modes())
    assert reason(engine.train_step(StepRequest(packed, session, 1, "a"))) == "DIGEST_VERSION"
    assert reason(behind) == "GAP"


def test_a_retry_of_the_next_session_does_not_share_the_end_of_the_last_ones(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    last = open_session(engine, "me", "n1")
    engine.train_step(StepRequest(payload(1), last, 1, "x")).result(WAIT)
    asked, taken_over = threading.Event(), threading.Event()
    read = Committer.read

    def slow(self: Committer, question: Any, *arguments: Any) -> Any:
        if question is Journal.step_of_request and not asked.is_set():
            asked.set()
            assert taken_over.wait(WAIT)
        return read(self, question, *arguments)

    monkeypatch.setattr(Committer, "read", slow)
    futures: list[Any] = []
    request = StepRequest(payload(1), last, None, "x")
    asking = threading.Thread(target=lambda: futures.append(engine.train_step(request)))
    asking.start()
    assert asked.wait(WAIT)
    present = open_session(engine, "me", "n2")
    again = engine.train_step(StepRequest(payload(1), present, 1, "x"))
    assert again.result(WAIT).replayed
    taken_over.set()
    asking.join(WAIT)
    assert reason(futures[0]) == "FENCED"


def test_a_look_up_that_fails_leaves_no_id_behind(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    engine.train_step(bare(1, "x")).result(WAIT)
    read, failures = Committer.read, [MemoryError()]

    def failing(self: Committer, question: Any, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(self, question, *arguments)

    monkeypatch.setattr(Committer, "read", failing)
    assert reason(engine.train_step(bare(1, "x"))) == "OUT_OF_RESOURCES"
    assert engine.train_step(bare(1, "x")).result(WAIT).replayed


def test_a_queued_step_is_not_refused_for_want_of_memory_for_its_hash(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, caller, compute = rig.start(), threading.get_ident(), Payload.hash

    def failing(self: Payload, version: DigestVersion) -> bytes:
        if threading.get_ident() == caller:
            raise MemoryError
        return compute(self, version)

    rig.trainer.gate.clear()
    first = engine.train_step(bare(1))  # the executor has it
    rig.trainer.entered.acquire()
    monkeypatch.setattr(Payload, "hash", failing)
    second = engine.train_step(bare(2))
    rig.trainer.gate.set()
    assert [each.result(WAIT).step for each in (first, second)] == [1, 2]


def test_a_step_whose_hash_cannot_be_computed_is_refused_before_it_changes_the_weights(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compute, failures = rig.start(), Payload.hash, [MemoryError(), MemoryError()]

    def failing(self: Payload, version: DigestVersion) -> bytes:
        if failures:
            raise failures.pop()
        return compute(self, version)

    monkeypatch.setattr(Payload, "hash", failing)
    assert reason(engine.train_step(bare(1))) == "OUT_OF_RESOURCES"
    assert not rig.trainer.trained
    assert engine.train_step(bare(1)).result(WAIT).step == 1
