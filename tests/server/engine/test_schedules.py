"""Schedules that once broke a promise of the protocol."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from counter import FAIL_ID, CounterTrainer
from rig import WAIT, FullDisk, Rig, bare, open_session, payload, reason, wait_for

from maskwire.v1.values import RunState
from maskwire_server.errors import Refused
from maskwire_server.journal.database import Database
from maskwire_server.journal.journal import Journal
from maskwire_server.requests import RestoreRequest, SaveRequest, SessionRef, SessionRequest, StepRequest

NO_AUTOMATIC = {"every_seconds": 1e9}


def test_a_delayed_attempt_under_the_old_number_does_not_train_again(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC, serve={"gap_seconds": 0.05})
    session = open_session(engine)
    renumbered = payload(2)
    assert reason(engine.train_step(StepRequest(payload(1, FAIL_ID), session, 1, "a"))) == "INTERNAL"
    assert reason(engine.train_step(StepRequest(renumbered, session, 2, "b"))) == "GAP"
    assert engine.train_step(StepRequest(renumbered, session, 1, "b")).result(WAIT).step == 1
    assert reason(engine.train_step(StepRequest(renumbered, session, 2, "b"))) == "PAYLOAD_MISMATCH"
    assert engine.train_step(StepRequest(payload(3), session, 2, "c")).result(WAIT).step == 2


def test_two_restores_with_one_id_at_the_same_moment_restore_once(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.save(SaveRequest("a")).result(WAIT)
    engine.train_step(bare(1)).result(WAIT)
    for attempt in range(20):
        together, answers = threading.Barrier(2), list[Any]()

        def call(together: threading.Barrier, answers: list[Any], request_id: str) -> None:
            together.wait(WAIT)
            answers.append(engine.restore(RestoreRequest("a", request_id)).exception(WAIT))

        arguments = (together, answers, f"id {attempt}")
        threads = [threading.Thread(target=call, args=arguments) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        refusals = [error.reason for error in answers if isinstance(error, Refused)]
        assert set(refusals) <= {"RESTORING"}
        assert len(refusals) <= 1
        wait_for(lambda: engine.status().state is RunState.SERVING)
        assert not rig.fatal
        assert engine.status().lineage == attempt + 2


def test_a_drain_on_a_full_disk_ends_though_a_checkpoint_is_due(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints={"every_steps": 2})
    engine.train_step(bare(1)).result(WAIT)

    def full(self: Database, write: Callable[[], object]) -> None:
        raise FullDisk("database or disk is full")

    rig.trainer.gate.clear()
    rig.trainer.entered = threading.Semaphore(0)
    engine.train_step(bare(2))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    monkeypatch.setattr(Database, "transaction", full)
    drained: list[bool] = []
    thread = threading.Thread(target=lambda: drained.append(engine.drain(WAIT)))
    thread.start()
    wait_for(lambda: engine.status().state is RunState.DRAINING)
    rig.trainer.gate.set()
    thread.join(WAIT)
    assert drained == [True]


def test_refused_requests_do_not_postpone_the_next_try_on_a_full_disk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.train_step(bare(1)).result(WAIT)
    tries: list[float] = []
    transaction = Database.transaction

    def full_once(self: Database, write: Callable[[], object]) -> None:
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise FullDisk("database or disk is full")
        transaction(self, write)

    monkeypatch.setattr(Database, "transaction", full_once)
    step = engine.train_step(bare(2))
    wait_for(lambda: len(tries) == 1)
    monkeypatch.setattr(engine._disk, "left", lambda _: -1)  # the reserve is not whole yet
    deadline = time.monotonic() + WAIT
    while not step.done() and time.monotonic() < deadline:
        assert reason(engine.train_step(bare(3))) == "HELD"
        time.sleep(0.1)
    assert step.result(0).step == 2


def test_files_that_change_while_a_restore_waits_are_not_loaded(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("a")).result(WAIT)
    rig.trainer.gate.clear()
    rig.trainer.entered = threading.Semaphore(0)
    running = engine.train_step(bare(2))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    restored = engine.restore(RestoreRequest("a", "r"))
    wait_for(lambda: engine.status().waiting_for == "the running step")
    shutil.move(rig.folder / "checkpoints" / "a", rig.folder.parent / "a")
    rig.trainer.gate.set()
    assert reason(restored) in ("CHECKPOINT_DAMAGED", "CHECKPOINT_NOT_FOUND")
    assert running.result(WAIT).step == 2
    assert not rig.fatal
    assert (engine.status().lineage, engine.train_step(bare(3)).result(WAIT).step) == (1, 3)


def test_a_session_is_not_idle_while_the_server_starts(rig: Rig) -> None:
    now = [1000.0]
    engine = rig.start(checkpoints=NO_AUTOMATIC, clock=lambda: now[0])
    session = open_session(engine, "me")
    engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)
    engine.close()
    shutil.rmtree(rig.folder / "checkpoints")

    class Slow(CounterTrainer):
        def snapshot(self) -> Any:
            now[0] += 61
            return super().snapshot()

    engine = rig.start(Slow, checkpoints=NO_AUTOMATIC, clock=lambda: now[0])
    assert engine.status().writer == "me"
    assert reason(engine.open_session(SessionRequest("other", "n2"))) == "WRITER_PRESENT"


def test_a_session_that_waits_for_the_running_step_is_refused_by_a_drain(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    rig.trainer.gate.clear()
    engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    opening = engine.open_session(SessionRequest("me", "n"))
    thread = threading.Thread(target=engine.drain, args=(WAIT,))
    thread.start()
    assert reason(opening) == "DRAINING"
    rig.trainer.gate.set()
    thread.join(WAIT)
    assert not rig.fatal


def test_a_retry_joins_the_save_that_is_being_made(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.train_step(bare(1)).result(WAIT)
    rig.trainer.gate.clear()
    rig.trainer.entered = threading.Semaphore(0)
    running = engine.train_step(bare(2))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    request = SaveRequest("mine", "id", expected_step=2)
    first = engine.save(request)
    again = engine.save(request)
    assert reason(engine.save(SaveRequest("another", "id"))) == "PAYLOAD_MISMATCH"
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 2
    assert first.result(WAIT) == again.result(WAIT)
    assert [info.name for info in engine.checkpoints()] == ["mine", "step-000000000"]


def test_a_checkpoint_that_was_removed_is_not_the_answer_to_a_save(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.train_step(bare(1)).result(WAIT)
    first = engine.save(SaveRequest()).result(WAIT)
    shutil.rmtree(rig.folder / "checkpoints" / first.name)
    again = engine.save(SaveRequest()).result(WAIT)
    assert (rig.folder / "checkpoints" / again.name).exists()
    engine.save(SaveRequest("x", "id")).result(WAIT)
    shutil.rmtree(rig.folder / "checkpoints" / "x")
    assert engine.save(SaveRequest("x", "id")).result(WAIT).name == "x"
    assert (rig.folder / "checkpoints" / "x").exists()


def test_a_step_of_the_ancestry_is_answered_after_a_restore(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    session = open_session(engine)
    first = engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)
    engine.save(SaveRequest("a")).result(WAIT)
    engine.restore(RestoreRequest("a")).result(WAIT)
    session = open_session(engine, nonce="after")
    again = engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)
    assert (again.replayed, again.digest) == (True, first.digest)


def test_a_session_admitted_before_a_restore_is_opened_before_it(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.save(SaveRequest("a")).result(WAIT)
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    opening = engine.open_session(SessionRequest("me", "n"))
    restored = engine.restore(RestoreRequest("a"))
    wait_for(lambda: engine.status().waiting_for == "the running step")
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 1
    opened = opening.result(WAIT)
    assert (opened.lineage, restored.result(WAIT).lineage) == (1, 2)
    session = SessionRef(opened.run_id, opened.lineage, opened.epoch)
    assert reason(engine.train_step(StepRequest(payload(2), session, 2))) == "WRONG_RUN"


def test_a_full_disk_refuses_a_restore_that_waits_behind_a_session(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.save(SaveRequest("a")).result(WAIT)
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    opening = engine.open_session(SessionRequest("me", "n"))
    restored = engine.restore(RestoreRequest("a"))
    wait_for(lambda: engine.status().waiting_for == "the running step")
    with monkeypatch.context() as full:
        full.setattr(engine._disk, "left", lambda _: -1)
        with engine._run.mutex:
            engine._committer.hold()
        rig.trainer.gate.set()
        assert reason(restored) == "HELD"
    assert running.result(WAIT).step == 1
    assert opening.result(WAIT).lineage == 1


def test_every_refused_number_is_remembered_until_it_is_taken(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC, serve={"gap_seconds": 1e9})
    session = open_session(engine)
    engine.step_refused(session, 3)
    engine.step_refused(session, 1)
    assert reason(engine.train_step(StepRequest(payload(2), session, 2))) == "GAP"
    for number in (1, 2):
        engine.train_step(StepRequest(payload(number), session, number)).result(WAIT)
    assert reason(engine.train_step(StepRequest(payload(4), session, 4))) == "GAP"
    third = StepRequest(payload(3), session, 3)
    assert engine.train_step(third).result(WAIT).step == 3
    assert engine.train_step(StepRequest(payload(4), session, 4)).result(WAIT).step == 4


def test_a_retry_that_names_another_number_than_the_step_gets_is_refused(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    session = open_session(engine)
    rig.trainer.gate.clear()
    running = engine.train_step(StepRequest(payload(1), session, 1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    queued = engine.train_step(StepRequest(payload(2), session, None, "x"))
    named = {number: engine.train_step(StepRequest(payload(2), session, number, "x")) for number in (2, 3)}
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 1
    assert reason(named[3]) == "PAYLOAD_MISMATCH"
    assert queued.result(WAIT) == named[2].result(WAIT)
    assert engine.status().step == 2


def test_a_retry_that_names_another_number_than_the_recorded_one_is_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    session = open_session(engine)
    engine.train_step(StepRequest(payload(1), session, 1, "x")).result(WAIT)
    engine.close()
    engine = rig.start(checkpoints=NO_AUTOMATIC)  # which does not remember the id
    asked, answered = threading.Event(), threading.Event()
    look_up = Journal.step_of_request

    def waiting(self: Journal, request_id: str) -> Any:
        asked.set()
        assert answered.wait(WAIT)
        return look_up(self, request_id)

    monkeypatch.setattr(Journal, "step_of_request", waiting)
    answers: list[Any] = []
    request = StepRequest(payload(1), session, None, "x")
    thread = threading.Thread(target=lambda: answers.append(engine.train_step(request).result(WAIT)))
    thread.start()
    assert asked.wait(WAIT)
    named = engine.train_step(StepRequest(payload(1), session, 3, "x"))
    answered.set()
    thread.join(WAIT)
    assert answers[0].replayed
    assert reason(named) == "PAYLOAD_MISMATCH"


@pytest.mark.parametrize("number", [3, None])
def test_an_abandoned_step_can_be_sent_again_under_another_number(rig: Rig, number: int | None) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC, serve={"gap_seconds": 1e9})
    session = open_session(engine)
    rig.trainer.gate.clear()
    running = engine.train_step(StepRequest(payload(1), session, 1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    second = engine.train_step(StepRequest(payload(2), session, 2, "b"))
    abandoned = engine.train_step(StepRequest(payload(3), session, number, "c"))
    behind = engine.train_step(StepRequest(payload(4), session, 4, "d"))
    assert second.cancel()
    assert abandoned.cancel()
    again = engine.train_step(StepRequest(payload(3), session, 2, "c"))
    assert reason(behind) == "GAP"
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 1
    assert again.result(WAIT).step == 2
    assert len(rig.trainer.trained) == 2
