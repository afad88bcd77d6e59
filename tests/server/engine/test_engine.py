"""The engine around a counting trainer: order, durability, refusals, and what survives a restart."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from counter import FAIL_ID, NAN_ID, CounterSnapshot, CounterTrainer
from rig import (
    DIGEST,
    WAIT,
    FullDisk,
    Rig,
    bare,
    make_engine,
    open_session,
    payload,
    reason,
    reason_of,
    wait_for,
)

from maskwire.v1.digest import step_digest
from maskwire.v1.values import Outcome, RunState, TokenizerDescription
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused, RunDirectoryError, StateLost
from maskwire_server.journal.journal import Journal
from maskwire_server.position import HistoryPosition
from maskwire_server.recovery.replay import InexactReplayError
from maskwire_server.requests import (
    EvalRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import EvalOptions, StepAnswer, StepResult


def test_steps_are_applied_in_order_and_the_digest_is_that_of_the_protocol(rig: Rig) -> None:
    engine = rig.start()
    digest = engine.status().digest
    answers = [future.result(WAIT) for future in [engine.train_step(bare(i)) for i in range(20)]]
    assert [answer.step for answer in answers] == list(range(1, 21))
    for seed, answer in enumerate(answers):
        digest = step_digest(digest, 1, answer.step, payload(seed).hash(DIGEST), Outcome.APPLIED)
        assert answer.digest == digest
    assert engine.status().durable_step == 20
    assert rig.trainer.trained == [(1, step) for step in range(1, 21)]


def test_a_window_that_arrives_out_of_order_is_put_in_order(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine)
    futures = {
        number: engine.train_step(StepRequest(payload(number), session, number)) for number in (4, 2, 3, 1, 5)
    }
    assert {number: future.result(WAIT).step for number, future in futures.items()} == {
        n: n for n in range(1, 6)
    }
    assert rig.trainer.trained == [(1, step) for step in range(1, 6)]


def test_a_step_whose_predecessor_never_comes_is_a_gap_after_a_while(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 0.1})
    session = open_session(engine)
    late = [engine.train_step(StepRequest(payload(n), session, n)) for n in (2, 3)]
    assert [reason(future) for future in late] == ["GAP", "GAP"]
    assert engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT).step == 1


def test_steps_behind_a_refused_one_are_gaps_at_once(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)
    before = engine.train_step(StepRequest(payload(2), session, 2))
    engine.step_refused(session, 1)
    behind = engine.train_step(StepRequest(payload(3), session, 3))
    assert [reason(before), reason(behind)] == ["GAP", "GAP"]
    assert engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT).step == 1
    assert engine.train_step(StepRequest(payload(2), session, 2)).result(WAIT).step == 2


def test_a_refusal_that_comes_before_the_step_before_it_is_kept_until_its_number_comes(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)

    def train(number: int) -> Future[StepAnswer]:
        return engine.train_step(StepRequest(payload(number), session, number))

    engine.step_refused(session, 3)
    engine.step_refused(session, 2)
    behind = [train(number) for number in (3, 4)]
    for future in behind:
        with pytest.raises(Refused, match="renumber the later steps from 2"):
            future.result(WAIT)
    assert train(1).result(WAIT).step == 1
    assert reason(train(3)) == "GAP"
    futures = [train(number) for number in (2, 3, 4)]
    assert [future.result(WAIT).step for future in futures] == [2, 3, 4]


def test_a_refusal_under_a_number_that_a_step_has_disturbs_nobody(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)
    waiting = [engine.train_step(StepRequest(payload(n), session, n)) for n in (3, 4)]
    engine.step_refused(session, 3)
    assert engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT).step == 1
    engine.step_refused(session, 1)
    assert engine.train_step(StepRequest(payload(2), session, 2)).result(WAIT).step == 2
    assert [future.result(WAIT).step for future in waiting] == [3, 4]


def test_a_step_that_was_given_up_does_not_hide_a_refused_one(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)

    def train(number: int, request_id: str) -> Future[StepAnswer]:
        return engine.train_step(StepRequest(payload(ord(request_id)), session, number, request_id))

    rig.trainer.gate.clear()
    futures = [train(number, request_id) for number, request_id in enumerate("abcd", 1)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    engine.step_refused(session, 5)
    assert reason(train(6, "f")) == "GAP"
    futures[2].cancel()  # its client's deadline passed
    rig.trainer.gate.set()
    assert reason(futures[3]) == "GAP"
    assert [train(3, "c").result(WAIT).step, train(4, "d").result(WAIT).step] == [3, 4]
    assert reason(train(6, "f")) == "GAP", "step 5 was refused, whatever became of step 3"
    assert train(5, "f").result(WAIT).step == 5


def test_behind_a_step_that_was_given_up_the_others_wait_for_it(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)
    rig.trainer.gate.clear()
    steps = [StepRequest(payload(n), session, n, f"r{n}") for n in range(5)]
    futures = [engine.train_step(step) for step in steps[1:4]]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    futures[2].cancel()
    rig.trainer.gate.set()
    assert futures[1].result(WAIT).step == 2
    behind = engine.train_step(steps[4])
    assert engine.train_step(steps[3]).result(WAIT).step == 3
    assert behind.result(WAIT).step == 4


def test_a_step_that_waited_until_its_client_went_comes_again_under_another_number(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)
    engine.train_step(StepRequest(payload(3), session, 3, "c")).cancel()
    again = engine.train_step(StepRequest(payload(3), session, 2, "c"))
    assert engine.train_step(StepRequest(payload(1), session, 1, "a")).result(WAIT).step == 1
    assert again.result(WAIT).step == 2
    assert engine.train_step(StepRequest(payload(4), session, 3, "d")).result(WAIT).step == 3


def test_steps_that_wait_for_their_turn_do_not_keep_the_next_one_out(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000, "queue_limit": 1})
    session = open_session(engine)
    futures = [engine.train_step(StepRequest(payload(n), session, n)) for n in (4, 3, 2, 1)]
    assert [future.result(WAIT).step for future in futures] == [4, 3, 2, 1]


def test_a_new_writer_knows_nothing_of_what_the_one_before_was_refused(rig: Rig) -> None:
    engine = rig.start()
    engine.step_refused(open_session(engine), 1)
    session = open_session(engine, nonce="another")
    ahead = engine.train_step(StepRequest(payload(2), session, 2))
    assert engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT).step == 1
    assert ahead.result(WAIT).step == 2


def test_a_failing_batch_frees_its_number_and_says_nothing_of_why(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 1000})
    session = open_session(engine)
    rig.trainer.gate.clear()
    first = engine.train_step(StepRequest(payload(1), session, 1))
    bad = engine.train_step(StepRequest(payload(2, FAIL_ID), session, 2))
    behind = [engine.train_step(StepRequest(payload(n), session, n)) for n in (3, 4)]
    rig.trainer.gate.set()
    assert first.result(WAIT).step == 1
    error = bad.exception(WAIT)
    behind.append(engine.train_step(StepRequest(payload(5), session, 5)))
    assert isinstance(error, Refused)
    assert error.reason == "INTERNAL"
    assert "secret" not in error.message
    assert [reason(future) for future in behind] == ["GAP"] * 3
    assert engine.train_step(StepRequest(payload(2), session, 2)).result(WAIT).step == 2
    assert engine.status().last_error.endswith(error.metadata["error_id"])


def test_bare_steps_behind_a_failing_one_move_up(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    futures = [engine.train_step(bare(i, first=FAIL_ID if i == 1 else None)) for i in range(6)]
    rig.trainer.gate.set()
    assert reason(futures.pop(1)) == "INTERNAL"
    steps = [future.result(WAIT).step for future in futures]
    assert sorted(steps) == [1, 2, 3, 4, 5]


def test_a_retry_joins_the_step_in_flight_and_later_gets_the_recorded_answer(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    first, again = engine.train_step(bare(0, "id")), engine.train_step(bare(0, "id"))
    rig.trainer.gate.set()
    assert first.result(WAIT) == again.result(WAIT)
    late = engine.train_step(bare(0, "id")).result(WAIT)
    assert late.replayed
    assert not first.result().replayed
    assert (late.step, late.digest, late.result.losses) == (
        1, first.result().digest, first.result().result.losses,
    )  # fmt: skip
    assert reason(engine.train_step(bare(1, "id"))) == "PAYLOAD_MISMATCH"
    assert engine.status().step == 1


def test_a_cancelled_step_that_has_not_begun_is_dropped(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    futures = [engine.train_step(bare(i)) for i in range(5)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    assert futures[3].cancel()
    rig.trainer.gate.set()
    assert [futures[i].result(WAIT).step for i in (0, 1, 2, 4)] == [1, 2, 3, 4]


def test_a_step_whose_client_left_while_it_ran_counts_all_the_same(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    future = engine.train_step(bare(0, "id"))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    future.cancel()
    rig.trainer.gate.set()
    assert engine.train_step(bare(1)).result(WAIT).step == 2
    assert engine.train_step(bare(0, "id")).result(WAIT).replayed


def test_a_full_queue_refuses_and_status_never_waits(rig: Rig) -> None:
    engine = rig.start(serve={"queue_limit": 2})
    rig.trainer.gate.clear()
    futures = [engine.train_step(bare(0))]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    futures += [engine.train_step(bare(i)) for i in (1, 2)]
    assert reason(engine.train_step(bare(9))) == "QUEUE_FULL"
    assert reason(engine.eval_loss(EvalRequest(payload(0).batch, EvalOptions((0, 1))))) == "QUEUE_FULL"
    assert engine.status().queue_length == 2
    rig.trainer.gate.set()
    assert [future.result(WAIT).step for future in futures] == [1, 2, 3]


def test_an_evaluation_names_the_step_and_digest_it_saw(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    step = engine.train_step(bare(0))
    seen = engine.eval_loss(EvalRequest(payload(1).batch, EvalOptions((0, 1))))
    after = engine.train_step(bare(2))
    rig.trainer.gate.set()
    answer = seen.result(WAIT)
    assert (answer.step, answer.digest) == (1, step.result(WAIT).digest)
    assert answer.result.losses.loss == step.result().result.losses.loss
    assert after.result(WAIT).step == 2


def test_takeover_fences_the_older_writer_and_its_queue(rig: Rig) -> None:
    engine = rig.start()
    old = open_session(engine, "old", "a")
    rig.trainer.gate.clear()
    futures = [engine.train_step(StepRequest(payload(n), old, n)) for n in range(1, 6)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    assert reason(engine.open_session(SessionRequest("new", "b"))) == "WRITER_PRESENT"
    opening = engine.open_session(SessionRequest("new", "b", takeover=True))
    refused = [reason(future) for future in futures[1:]]
    rig.trainer.gate.set()
    answer = opening.result(WAIT)
    assert futures[0].result(WAIT).step == 1, "what was computed is kept"
    assert refused == ["FENCED"] * 4
    assert (answer.epoch, answer.step, answer.durable_step) == (2, 1, 1)
    assert reason(engine.train_step(StepRequest(payload(2), old, 2))) == "FENCED"
    new = SessionRef(answer.run_id, 1, 2)
    assert engine.train_step(StepRequest(payload(2), new, 2)).result(WAIT).step == 2
    assert reason(engine.open_session(SessionRequest("old", "a"))) == "FENCED"
    assert reason(engine.open_session(SessionRequest("old", "c", held_epoch=1, takeover=True))) == "FENCED"


def test_the_same_name_and_the_same_nonce(rig: Rig) -> None:
    engine = rig.start()
    first = open_session(engine, "job", "a")
    assert open_session(engine, "job", "a") == first, "the same nonce gets the same epoch"
    assert open_session(engine, "job", "b").epoch == 2, "a job started again goes on at once"


def test_a_session_ends_when_closed_or_idle(rig: Rig) -> None:
    now = [0.0]
    engine = rig.start(clock=lambda: now[0], serve={"session_idle_seconds": 60})
    session = open_session(engine, "a", "1")
    now[0] = 59.0
    assert engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT).step == 1
    now[0] = 118.0
    assert reason(engine.train_step(bare(2))) == "WRITER_PRESENT"
    now[0] = 119.5
    assert engine.train_step(bare(2)).result(WAIT).step == 2
    assert engine.train_step(StepRequest(payload(3), session, 3)).result(WAIT).step == 3, "nobody took over"
    engine.close_session(session).result(WAIT)
    engine.close_session(session).result(WAIT)
    assert engine.train_step(bare(4)).result(WAIT).step == 4
    assert reason(engine.train_step(StepRequest(payload(5), session, 5))) == "UNKNOWN_EPOCH"


def test_a_history_that_the_server_does_not_have_is_found(rig: Rig) -> None:
    engine = rig.start()
    answers = [engine.train_step(bare(i)).result(WAIT) for i in range(3)]
    run = engine.status().run_id

    def claim(step: int, digest: bytes) -> Future[Any]:
        return engine.open_session(
            SessionRequest("me", f"n{step}{digest[:2].hex()}", history=HistoryPosition(run, 1, step, digest))
        )

    assert claim(2, answers[1].digest).result(WAIT).durable_step == 3
    assert reason(claim(4, answers[2].digest)) == "HISTORY_LOST"
    assert reason(claim(2, answers[2].digest)) == "HISTORY_LOST"


def test_everything_acknowledged_is_there_after_a_restart(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine)
    answers = [
        engine.train_step(StepRequest(payload(n), session, n, f"r{n}")).result(WAIT) for n in range(1, 8)
    ]
    state = rig.trainer.state
    engine.close()
    again = rig.start()
    assert rig.trainer.state == state
    assert again.status().digest == answers[-1].digest
    assert again.train_step(StepRequest(payload(3), session, 3, "r3")).result(WAIT).replayed
    assert again.train_step(StepRequest(payload(8), session, 8, "r8")).result(WAIT).step == 8, (
        "the session lives"
    )


def test_an_engine_that_is_closed_while_it_starts_ends(rig: Rig) -> None:
    reached, release = threading.Event(), threading.Event()

    class Slow(CounterTrainer):
        def warm_up(self) -> None:
            reached.set()
            assert release.wait(WAIT)

    engine = make_engine(rig.folder, rig.config(), Slow)
    assert reached.wait(WAIT)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    wait_for(lambda: engine._start.stopping)
    release.set()
    closing.join(WAIT)
    assert not closing.is_alive()


def test_a_restart_after_a_drain_replays_nothing(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(5):
        engine.train_step(bare(seed)).result(WAIT)
    assert engine.drain(WAIT)
    assert reason_of(lambda: engine.train_step(bare(9))) == "DRAINING"
    engine.close()
    engine.close()
    assert [info.step for info in engine.checkpoints()] == [5, 0]
    rig.start()
    assert rig.trainer.trained == []


def test_draining_finishes_the_running_step_and_refuses_the_rest(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    futures = [engine.train_step(bare(i)) for i in range(5)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    threading.Timer(0.2, rig.trainer.gate.set).start()
    assert engine.drain(WAIT)
    outcomes = [future.exception(WAIT) for future in futures]
    assert outcomes[0] is None
    assert all(isinstance(error, Refused) and error.reason == "DRAINING" for error in outcomes[1:])


def test_every_request_is_answered_whenever_the_engine_ends(rig: Rig) -> None:
    engine = rig.start()
    futures: list[Future[Any]] = []

    def hammer() -> None:
        while True:
            try:
                futures.append(engine.train_step(bare(1)))
            except Refused as error:
                assert error.reason in ("DRAINING", "QUEUE_FULL")
                return
            time.sleep(1e-4)  # the engine has a share of the interpreter too

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(futures) > 50)
    engine.close()
    for thread in threads:
        thread.join(WAIT)
    errors = [future.exception(WAIT) for future in futures]
    assert {error.reason for error in errors if isinstance(error, Refused)} >= {"DRAINING"}
    applied = sorted(
        future.result().step for future, error in zip(futures, errors, strict=True) if error is None
    )
    assert applied == list(range(1, len(applied) + 1))


def test_a_drain_that_takes_too_long_says_so(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    engine.train_step(bare(0))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    assert engine.drain(0.05) is False
    rig.trainer.gate.set()


def test_checkpoints_come_at_exact_steps_and_old_ones_go(rig: Rig) -> None:
    engine = rig.start(checkpoints={"every_steps": 3, "keep_last": 2})
    for seed in range(13):
        engine.train_step(bare(seed)).result(WAIT)
        if seed == 4:
            engine.save(SaveRequest("s4")).result(WAIT)
        wait_for(lambda: not engine._saves.busy)
    assert [info.step for info in engine.checkpoints()] == [12, 9, 5], "two automatic ones, and the named"
    engine.close()
    journal = Journal(rig.folder)
    kept = [record.step for record, batch in journal.steps_after(1, 0) if batch is not None]
    assert len(list(journal.steps_after(1, 0))) == 13, "records stay for ever"
    journal.close()
    assert kept == [10, 11, 12, 13], "batches go behind the second-newest checkpoint"
    rig.start()
    assert rig.trainer.trained == [(1, 13)]


def test_an_automatic_checkpoint_that_falls_due_while_another_is_copied_is_made_up_for(rig: Rig) -> None:
    class Slow(CounterTrainer):
        def snapshot(self) -> CounterSnapshot:
            self.gate.wait(WAIT)
            return super().snapshot()

    engine = rig.start(Slow, checkpoints={"every_steps": 3})
    for seed in range(2):
        engine.train_step(bare(seed)).result(WAIT)
    rig.trainer.gate.clear()
    saving = engine.save(SaveRequest("two"))
    wait_for(lambda: engine._saves.busy)
    third = engine.train_step(bare(2))
    rig.trainer.gate.set()
    assert saving.result(WAIT).step == 2
    third.result(WAIT)
    engine.train_step(bare(3)).result(WAIT)
    wait_for(lambda: engine.checkpoints()[0].step == 4)


def test_a_copy_that_fails_is_tried_again_when_the_next_is_due(rig: Rig) -> None:
    class Short(CounterTrainer):
        copies: ClassVar[int] = 0

        def snapshot(self) -> CounterSnapshot:
            if self.trained:
                Short.copies += 1
                raise MemoryError
            return super().snapshot()

    engine = rig.start(Short, checkpoints={"every_steps": 5})
    for seed in range(19):
        engine.train_step(bare(seed)).result(WAIT)
    assert Short.copies == 3, "after steps 5, 10 and 15"


def test_a_save_that_failed_holds_no_copy_of_the_state(rig: Rig) -> None:
    copies: list[weakref.ref[CounterSnapshot]] = []

    class Full(CounterSnapshot):
        def write(self, folder: Path) -> None:
            copies.append(weakref.ref(self))
            raise OSError(errno.ENOSPC, "No space left on device")

    class Trainer(CounterTrainer):
        def snapshot(self) -> CounterSnapshot:
            return Full({}) if self.trained else super().snapshot()

    engine = rig.start(Trainer)
    engine.train_step(bare(0)).result(WAIT)
    gc.disable()
    try:
        refused = engine.save(SaveRequest("a")).exception(WAIT)
        engine.train_step(bare(1)).result(WAIT)
        assert isinstance(refused, Refused)
        assert refused.reason == "CHECKPOINT_FAILED"
        wait_for(lambda: copies[0]() is None)
    finally:
        gc.enable()


def test_a_save_that_the_end_overtakes_is_refused(rig: Rig) -> None:
    class Slow(CounterTrainer):
        def snapshot(self) -> CounterSnapshot:
            self.entered.release()
            self.gate.wait(WAIT)
            return super().snapshot()

    engine = rig.start(Slow)
    assert rig.trainer.entered.acquire(timeout=WAIT)  # the first one's
    rig.trainer.gate.clear()
    saving = engine.save(SaveRequest("a"))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert reason(saving) == "DRAINING"
    rig.trainer.gate.set()
    closing.join(WAIT)


def test_a_restore_of_what_is_being_deleted_is_refused(rig: Rig) -> None:
    engine = rig.start(checkpoints={"keep_best": 0})
    for name in ("a", "b", "c"):
        engine.train_step(bare(ord(name))).result(WAIT)
        engine.save(SaveRequest(name)).result(WAIT)
    reached, go_on = threading.Event(), threading.Event()

    def act(place: str) -> None:
        if place == "checkpoint.collecting":
            reached.set()
            go_on.wait(WAIT)

    failpoints.install(act)
    try:
        deleting = engine.delete("a")
        assert reached.wait(WAIT)
        restoring = engine.restore(RestoreRequest("a"))
        time.sleep(0.05)  # for the engine to come to the restore
        go_on.set()
        assert reason(restoring) == "CHECKPOINT_NOT_FOUND"
        deleting.result(WAIT)
    finally:
        failpoints.install(None)
    assert engine.train_step(bare(9)).result(WAIT).step == 4
    assert rig.fatal == []


def test_a_save_of_another_state_than_expected_is_refused(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    assert reason(engine.save(SaveRequest("a", expected_step=2))) == "WRONG_RUN"
    assert reason(engine.save(SaveRequest("a", expected_lineage=2, expected_step=1))) == "WRONG_RUN"
    running = engine.train_step(bare(1))
    assert engine.save(SaveRequest(score=0.5, expected_lineage=1, expected_step=2)).result(WAIT).step == 2
    assert running.result(WAIT).step == 2
    assert [info.step for info in engine.checkpoints()] == [2, 0]


def test_a_refused_save_takes_no_automatic_ones_place(rig: Rig) -> None:
    now = 100.0
    engine = rig.start(clock=lambda: now, checkpoints={"every_seconds": 10.0})
    for step in range(1, 5):
        now += 6.0
        assert reason(engine.save(SaveRequest(expected_step=99))) == "WRONG_RUN"
        engine.train_step(bare(step)).result(WAIT)
        wait_for(lambda: not engine._saves.busy)
    assert [info.step for info in engine.checkpoints()] == [4, 2, 0]


def test_something_else_under_a_name_of_the_servers_own_is_gone_round(rig: Rig) -> None:
    engine = rig.start()
    place = rig.folder / "checkpoints" / "step-000000001" / ".DS_Store"
    place.parent.mkdir()
    place.write_text("somebody's")
    engine.train_step(bare(0)).result(WAIT)
    assert engine.save(SaveRequest()).result(WAIT).name == "step-000000001-2"
    assert place.exists()


def test_saves_that_wait_are_refused_by_a_restore(rig: Rig) -> None:
    class Slow(CounterTrainer):
        def snapshot(self) -> CounterSnapshot:
            self.gate.wait(WAIT)
            return super().snapshot()

    engine = rig.start(Slow)
    engine.train_step(bare(0)).result(WAIT)
    engine.save(SaveRequest("base")).result(WAIT)
    engine.train_step(bare(1)).result(WAIT)
    rig.trainer.gate.clear()
    saves = [engine.save(SaveRequest(f"s{n}", score=1.0)) for n in range(3)]
    wait_for(lambda: engine._saves.busy)
    restoring = engine.restore(RestoreRequest("base"))
    wait_for(lambda: engine.status().state is RunState.RESTORING)
    rig.trainer.gate.set()
    assert restoring.result(WAIT).lineage == 2
    assert (saves[0].result(WAIT).lineage, saves[0].result(WAIT).step) == (1, 2), "it had begun"
    assert [reason(save) for save in saves[1:]] == ["WRONG_RUN", "WRONG_RUN"]


def test_damage_to_the_only_base_under_changed_settings_is_no_end(rig: Rig) -> None:
    class Elsewhere(CounterTrainer):
        @property
        def versions(self) -> dict[str, str]:
            return {"device": "another", "threads": "1"}

    engine = rig.start()
    for seed in range(5):
        engine.train_step(bare(seed)).result(WAIT)
    engine.drain(WAIT)
    engine.close()
    engine = rig.start(Elsewhere)
    last = engine.train_step(bare(5)).result(WAIT)
    state = rig.trainer.state
    names = [info.name for info in engine.checkpoints() if info.step == 5]
    engine.close()
    assert len(names) == 2
    for name in names:  # whichever it is
        copy = shutil.copytree(rig.folder, rig.folder.with_name(name))
        (copy / "checkpoints" / name / "state.json").write_text("{}")
        again = Rig(copy)
        engine = again.start(Elsewhere)
        assert (engine.status().step, engine.status().digest) == (6, last.digest)
        assert again.trainer.state == state
        engine.close()


def test_changed_settings_copy_a_state_once_and_refuse_no_start_for_want_of_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(CounterTrainer):
        @property
        def versions(self) -> dict[str, str]:
            return {"device": "another", "threads": "1"}

    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    engine.drain(WAIT)
    engine.close()
    with monkeypatch.context() as full:
        full.setattr(CounterSnapshot, "write", no_space)
        engine = rig.start(Elsewhere)
        assert [info.step for info in engine.checkpoints()] == [1, 0]
        engine.close()
    for trainer in (CounterTrainer, Elsewhere, CounterTrainer):
        engine = rig.start(trainer)
        assert [info.step for info in engine.checkpoints()] == [1, 1, 0]
        engine.close()


def no_space(snapshot: CounterSnapshot, folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_is_done_once_for_a_request_and_a_name_is_taken_once(rig: Rig) -> None:
    engine = rig.start()
    first = engine.save(SaveRequest("a", "id", {"x": "y"})).result(WAIT)
    assert engine.save(SaveRequest("a", "id", {"x": "y"})).result(WAIT) == first
    assert first.labels == {"x": "y"}
    assert reason(engine.save(SaveRequest("a", "other"))) == "CHECKPOINT_EXISTS"
    both = [engine.save(SaveRequest("b", f"r{i}")) for i in range(2)]
    errors = [future.exception(WAIT) for future in both]
    assert [error is None for error in errors].count(True) == 1


def test_a_restore_opens_a_lineage_and_fences_everybody(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine)
    answers = [engine.train_step(StepRequest(payload(n), session, n)).result(WAIT) for n in range(1, 4)]
    state = rig.trainer.state
    engine.save(SaveRequest("three")).result(WAIT)
    engine.train_step(StepRequest(payload(4), session, 4)).result(WAIT)
    assert reason(engine.restore(RestoreRequest("three", expected_lineage=2))) == "WRONG_RUN"
    assert reason(engine.restore(RestoreRequest("three", expected_step=3))) == "WRONG_RUN"
    assert reason(engine.restore(RestoreRequest("none"))) == "CHECKPOINT_NOT_FOUND"
    assert engine.status().state is RunState.SERVING
    restored = engine.restore(RestoreRequest("three", "id", 1, 4)).result(WAIT)
    assert (restored.lineage, restored.step) == (2, 3)
    assert restored.digest != answers[-1].digest
    assert rig.trainer.state == state
    assert engine.restore(RestoreRequest("three", "id")).result(WAIT) == restored
    assert reason(engine.train_step(StepRequest(payload(4), session, 4))) == "WRONG_RUN"
    assert reason(engine.open_session(SessionRequest("me", "new", held_epoch=session.epoch))) == "FENCED"
    fresh = open_session(engine, "me", "newer")
    assert (fresh.lineage, fresh.epoch) == (2, 3)
    last = engine.train_step(StepRequest(payload(5), fresh, 4)).result(WAIT)
    state = rig.trainer.state
    engine.close()
    again = rig.start()
    assert (again.status().lineage, again.status().digest) == (2, last.digest)
    assert rig.trainer.state == state, "recovered over both lineages"


def test_a_damaged_checkpoint_is_passed_over_and_the_journal_makes_up(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(6):
        engine.train_step(bare(seed)).result(WAIT)
        if seed == 3:
            engine.save(SaveRequest("four")).result(WAIT)
    state = rig.trainer.state
    engine.close()
    (rig.folder / "checkpoints" / "four" / "state.json").write_text("{}")
    rig.start()
    assert rig.trainer.state == state
    assert len(rig.trainer.trained) == 6


def test_three_steps_that_are_not_finite_halt_until_a_takeover(rig: Rig) -> None:
    engine = rig.start()
    good = engine.train_step(bare(0)).result(WAIT)
    for seed in range(2):
        result = engine.train_step(bare(seed, first=NAN_ID)).result(WAIT)
        assert result.result.outcome is Outcome.SKIPPED_NON_FINITE
    engine.train_step(bare(5)).result(WAIT)
    for seed in range(3):
        engine.train_step(bare(seed, first=NAN_ID)).result(WAIT)
    assert reason(engine.train_step(bare(1))) == "HALTED"
    engine.close()
    again = rig.start()
    assert again.status().state is RunState.HALTED
    open_session(again, "me", "n")
    session = open_session(again, "me", "n2", takeover=True)
    assert again.status().state is RunState.SERVING
    assert again.train_step(StepRequest(payload(7), session)).result(WAIT).step == 8
    again.close()
    assert rig.start().status().state is RunState.SERVING
    assert good.result.outcome is Outcome.APPLIED


def test_a_halted_run_says_so_behind_a_step_that_was_refused_before_it_came(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine, "me", "n")
    engine.step_refused(session, 5)
    for seed in range(3):
        engine.train_step(StepRequest(payload(seed, NAN_ID), session)).result(WAIT)
    assert reason(engine.train_step(StepRequest(payload(7), session, 6))) == "HALTED"


def test_a_full_disk_holds_and_goes_on_when_there_is_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    transaction, full = Journal.transaction, threading.Event()
    full.set()

    def limited(self: Journal, write: Callable[[], object]) -> None:
        if full.is_set():
            raise FullDisk("database or disk is full")
        transaction(self, write)

    monkeypatch.setattr(Journal, "transaction", limited)
    held = engine.train_step(bare(1, "held"))
    wait_for(lambda: engine.status().state is RunState.HELD)
    assert engine.status().durable_step == 1
    assert "space" in engine.status().waiting_for
    assert reason(engine.train_step(bare(2))) == "HELD"
    assert not held.done()
    full.clear()
    assert held.result(WAIT).step == 2
    assert engine.train_step(bare(2)).result(WAIT).step == 3
    assert engine.status().state is RunState.SERVING


def test_a_journal_that_fails_otherwise_ends_the_process_and_answers_unknown(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()

    def broken(self: Journal, write: Callable[[], object]) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Journal, "transaction", broken)
    assert reason(engine.train_step(bare(1))) == "DRAINING", "unavailable: ask again"
    assert [type(error) for error in rig.fatal] == [sqlite3.OperationalError]


def test_an_update_that_failed_half_way_ends_the_process(rig: Rig) -> None:
    class Breaking(CounterTrainer):
        def train_step(self, *arguments: Any) -> Any:
            raise StateLost("half-way")

    engine = rig.start(Breaking)
    assert reason(engine.train_step(bare(1))) == "DRAINING"
    assert [type(error) for error in rig.fatal] == [StateLost]


def test_a_changed_model_is_refused_and_changed_threads_only_with_steps_to_replay(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    engine.close()
    with pytest.raises(RunDirectoryError, match=r"model.dim is 256 in the run, but 128 in the configuration"):
        rig.start(model={"dim": 128})
    with pytest.raises(RunDirectoryError, match=r"run.seed is 0"):
        rig.start(run={"seed": 1})
    monkeypatch.setattr(CounterTrainer, "threads", 3)
    with pytest.raises(RunDirectoryError, match=r"step 1 .*\(fingerprint.threads was '1'\)"):
        rig.start(serve={"threads": 3})
    engine = rig.start()
    assert rig.trainer.threads == 1, "nobody asked for another number: the run's own"
    assert engine.drain(WAIT)
    engine.close()
    rig.start(serve={"threads": 3})


def test_steps_are_computed_again_under_the_optimizer_section_they_were_trained_with(rig: Rig) -> None:
    class Following(CounterTrainer):
        computed: ClassVar[list[tuple[int, float | None]]] = []
        rate: float | None = None  # as it was built

        def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
            if optimizer["ema_decay"]:
                raise ValueError("optimizer.ema_decay was 0.9, is 0.0")
            self.rate = optimizer["learning_rate"]

        def train_step(self, lineage: int, step: int, *arguments: Any) -> StepResult:
            self.computed.append((step, self.rate))
            return super().train_step(lineage, step, *arguments)

    for rate in (0.1, 0.2, 0.3):
        engine = rig.start(Following, optimizer={"learning_rate": rate})
        for seed in range(2):
            engine.train_step(bare(seed)).result(WAIT)
        engine.close()
    assert Following.computed == [
        (1, None), (2, None),
        (1, 0.1), (2, 0.1), (3, 0.2), (4, 0.2),
        (1, 0.1), (2, 0.1), (3, 0.2), (4, 0.2), (5, 0.3), (6, 0.3),
    ]  # fmt: skip
    engine = rig.start(optimizer={"learning_rate": 0.3, "ema_decay": 0.9})
    engine.train_step(bare(9)).result(WAIT)
    engine.close()
    with pytest.raises(RunDirectoryError, match=r"step 7 must be recomputed.*ema_decay was 0.9, is 0.0"):
        rig.start(Following, optimizer={"learning_rate": 0.3})


def test_the_data_is_kept_from_the_first_step_on_and_changes_only_on_demand(rig: Rig) -> None:
    first = {"content": "sha256:" + "0" * 40, "length": "16", "seed": "0"}
    longer, other = {**first, "length": "32"}, {**first, "content": "sha256:" + "1" * 40}

    def open_with(engine: Engine, data: dict[str, str], nonce: str, **options: Any) -> dict[str, str]:
        return engine.open_session(SessionRequest("job", nonce, data=data, **options)).result(WAIT).data

    def refused(engine: Engine, data: dict[str, str]) -> Refused:
        with pytest.raises(Refused) as raised:
            open_with(engine, data, "z")
        assert raised.value.reason == "DATA_CHANGED"
        return raised.value

    engine = rig.start()
    assert open_with(engine, {}, "a") == {}
    assert open_with(engine, longer, "b") == longer
    assert open_with(engine, first, "c") == first, "nothing was trained on it: it can be corrected"
    answer = engine.open_session(SessionRequest("job", "d")).result(WAIT)
    session = SessionRef(answer.run_id, answer.lineage, answer.epoch)
    engine.train_step(StepRequest(bare(0).payload, session=session)).result(WAIT)
    for _ in range(2):
        assert engine.status().data == first
        found = refused(engine, {**other, "length": "32", "held_out": "0.1"})
        assert "differs; held_out was not set and is now 0.1; length was 16 and is now 32" in str(found)
        assert found.metadata["changed"] == "content,held_out,length"
        assert refused(engine, {} | {"seed": "0"}).metadata["changed"] == "content,length"
        engine.close()
        engine = rig.start()
    assert open_with(engine, first, "e") == open_with(engine, {}, "f") == first
    assert open_with(engine, longer, "g", allow_changed_data=True) == longer
    assert open_with(engine, other, "g", allow_changed_data=True) == other, "within the same session"
    engine.close()
    engine = rig.start()
    assert engine.status().data == other
    assert "length was 16 and is now 32; content" not in str(refused(engine, longer))


def test_a_pretrained_model_takes_no_bytes(rig: Rig) -> None:
    engine = rig.start(pretrained=True)
    refusal = engine.open_session(SessionRequest("job", "a", tokenizer="bytes")).exception(WAIT)
    assert isinstance(refusal, Refused)
    assert refusal.reason == "TOKENIZER_MISMATCH"
    assert "prepare the data with the model's tokenizer.json" in str(refusal)
    engine.open_session(SessionRequest("job", "b", tokenizer="sha256:1")).result(WAIT)


def test_the_kept_tokenizer_is_read_during_a_shutdown_too(rig: Rig) -> None:
    """The last samples are written while the server shuts down."""
    engine = rig.start()
    session = open_session(engine, tokenizer="bytes")
    engine.train_step(StepRequest(payload(1), session, 1)).result(WAIT)
    kept = TokenizerDescription("bytes", document_end=(257,))
    engine.tokenizer.keep(kept)
    engine.close()
    with pytest.raises(Refused):
        _ = engine.tokenizer
    assert engine.kept_tokenizer.of_run() == kept


def test_the_tokenizer_is_kept_from_the_first_step_on(rig: Rig) -> None:
    def open_with(engine: Engine, tokenizer: str, nonce: str) -> str:
        return engine.open_session(SessionRequest("job", nonce, tokenizer=tokenizer)).result(WAIT).tokenizer

    engine = rig.start()
    assert open_with(engine, "", "a") == ""
    assert open_with(engine, "bytes", "b") == "bytes"
    assert open_with(engine, "sha256:1", "c") == "sha256:1", "nothing was trained on it: it can be corrected"
    assert engine.status().tokenizer == "sha256:1"
    answer = engine.open_session(SessionRequest("job", "d")).result(WAIT)
    session = SessionRef(answer.run_id, answer.lineage, answer.epoch)
    engine.train_step(StepRequest(bare(0).payload, session=session)).result(WAIT)
    assert reason(engine.open_session(SessionRequest("job", "e", tokenizer="bytes"))) == "TOKENIZER_MISMATCH"
    engine.close()
    engine = rig.start()
    assert engine.status().tokenizer == "sha256:1"
    assert reason(engine.open_session(SessionRequest("job", "f", tokenizer="bytes"))) == "TOKENIZER_MISMATCH"
    assert open_with(engine, "sha256:1", "g") == open_with(engine, "", "h") == "sha256:1"


def test_a_replay_that_gives_another_result_stops_and_names_the_step(rig: Rig) -> None:
    class Drifting(CounterTrainer):
        def train_step(self, lineage: int, step: int, *arguments: Any) -> Any:
            if step == 2:
                self.state = self.state[::-1]
            return super().train_step(lineage, step, *arguments)

    engine = rig.start()
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    engine.close()
    with pytest.raises(InexactReplayError, match="step 2 computed again"):
        rig.start(Drifting)
    accepted = rig.start(Drifting, accept_inexact_replay=True)
    assert accepted.status().step == 3


def test_a_checkpoint_ahead_of_the_journal_means_that_the_journal_lost_steps(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    engine.save(SaveRequest("three")).result(WAIT)
    engine.close()
    with sqlite3.connect(rig.folder / "journal.sqlite") as database:
        database.execute("DELETE FROM steps WHERE step = 3")
    database.close()
    with pytest.raises(RunDirectoryError, match="the journal lost acknowledged steps"):
        rig.start()


def test_a_hole_in_the_journal_is_found(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(4):
        engine.train_step(bare(seed)).result(WAIT)
    engine.close()
    with sqlite3.connect(rig.folder / "journal.sqlite") as database:
        database.execute("DELETE FROM steps WHERE step = 2")
    database.close()
    with pytest.raises(RunDirectoryError, match=r"step 2 .* is missing"):
        rig.start()


def test_threads_and_descriptors_are_given_back(tmp_path: Path) -> None:
    def once(name: str) -> None:
        rig = Rig(tmp_path / name)
        engine = rig.start()
        engine.train_step(bare(0)).result(WAIT)
        engine.save(SaveRequest("a")).result(WAIT)
        engine.close()

    once("first")
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(3):
        once(f"again{number}")
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


WORKER = """
import sys, numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from rig import make_engine
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.requests import StepRequest
whole = config.load(None, checkpoints={"every_steps": 7, "keep_last": 2})
engine = make_engine(Path(sys.argv[1]), whole, on_fatal=print)
engine.wait_serving(30)
while True:
    step = engine.status().step + 1
    ids = np.random.default_rng(step).integers(10, 200, (2, 8))
    answer = engine.train_step(StepRequest(Payload(Batch(ids, 2, 8), Modes()), step=step)).result()
    print(answer.step, answer.digest.hex(), flush=True)
"""


def test_kill_minus_nine_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    run_dir, generator = tmp_path / "run", np.random.default_rng(0)
    acknowledged: dict[int, str] = {}
    for _ in range(6):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(run_dir), str(Path(__file__).resolve().parents[2])],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        lines = int(generator.integers(1, 60))
        for _ in range(lines):
            step, digest = worker.stdout.readline().split()
            assert acknowledged.get(int(step), digest) == digest
            assert int(step) > max(acknowledged, default=0)
            acknowledged[int(step)] = digest
        worker.send_signal(signal.SIGKILL)
        for line in worker.stdout.read().splitlines():  # said before the signal came
            if len(line.split()) == 2 and len(line.split()[1]) == 64:
                acknowledged[int(line.split()[0])] = line.split()[1]
        worker.wait()
        worker.stdout.close()
    # The digest chain of one run without a fault.
    calm = Rig(tmp_path / "calm")
    engine = calm.start(checkpoints={"every_steps": 7, "keep_last": 2})
    digests: dict[int, StepAnswer] = {}
    for step in range(1, max(acknowledged) + 1):
        ids = np.random.default_rng(step).integers(10, 200, (2, 8))
        digests[step] = engine.train_step(StepRequest(Payload(Batch(ids, 2, 8), Modes()))).result(WAIT)
    engine.close()
    assert sorted(acknowledged) == list(range(1, max(acknowledged) + 1)) or len(acknowledged) > 6
    assert all(digests[step].digest.hex() == digest for step, digest in acknowledged.items())
