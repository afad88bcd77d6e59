"""What waits when training is held, halted or restored, and what is answered though nothing is admitted."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
from counter import NAN_ID
from rig import WAIT, Rig, bare, open_session, payload, reason, wait_for

from maskwire.v1.values import Outcome, RunState
from maskwire_server.engine.engine import Engine
from maskwire_server.journal.journal import Journal
from maskwire_server.requests import EvalRequest, RestoreRequest, SaveRequest, SessionRef, StepRequest
from maskwire_server.results import EvalOptions, StepAnswer

NO_AUTOMATIC = {"every_seconds": 1e9}


class Watched:
    """Tells when the executor has nothing that it may do."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine, self._idle = engine, threading.Event()
        wait = engine._run.work.wait

        def noting(timeout: float | None = None) -> None:
            self._idle.set()
            wait(timeout)

        monkeypatch.setattr(engine._run.work, "wait", noting)

    def look_at_the_queue(self) -> None:
        """Let the executor look at the whole queue, and the committer do what it was asked for by that."""
        for _ in range(4):  # the first look may have begun before; the last ones see what the others changed
            self._idle.clear()
            self._engine._run.work.set()
            assert self._idle.wait(WAIT)
            self._engine._committer.read(Journal.log_bytes)


def test_nothing_is_taken_from_the_queue_while_the_disk_is_full(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    executor = Watched(engine, monkeypatch)
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    step = engine.train_step(bare(2))
    evaluation = engine.eval_loss(EvalRequest(payload(1).batch, EvalOptions(row_ids=(0, 1))))
    with monkeypatch.context() as full:
        full.setattr(engine._disk, "left", lambda _: -1)
        with engine._run.mutex:
            engine._committer.hold()
        rig.trainer.gate.set()
        assert running.result(WAIT).step == 1, "what was computed is committed"
        executor.look_at_the_queue()
        status = engine.status()
        assert (status.state, status.step, status.queue_length) == (RunState.HELD, 1, 2)
        assert not step.done()
        assert not evaluation.done()
    assert step.result(WAIT).step == 2
    assert evaluation.result(WAIT).step in (1, 2)
    assert rig.trainer.trained == [(1, 1), (1, 2)]


def test_the_third_step_in_a_row_that_is_not_finite_refuses_all_that_wait(rig: Rig) -> None:
    engine = rig.start(serve={"gap_seconds": 600})
    session = open_session(engine)
    rig.trainer.gate.clear()
    bad = [engine.train_step(StepRequest(payload(n, NAN_ID), session, n)) for n in (1, 2, 3)]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    behind = [engine.train_step(StepRequest(payload(n), session, n)) for n in (4, 5, 7)]
    rig.trainer.gate.set()
    outcomes = [future.result(WAIT).result.outcome for future in bad]
    assert outcomes == [Outcome.SKIPPED_NON_FINITE] * 3
    assert [reason(future) for future in behind] == ["HALTED"] * 3
    assert rig.trainer.trained == []
    assert (engine.status().state, engine.status().step) == (RunState.HALTED, 3)


def test_a_restore_goes_before_the_steps_that_wait_and_refuses_them(rig: Rig) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    engine.save(SaveRequest("a")).result(WAIT)
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    waiting = [engine.train_step(bare(seed)) for seed in (2, 3)]
    restored = engine.restore(RestoreRequest("a"))
    wait_for(lambda: engine.status().waiting_for == "the running step")
    rig.trainer.gate.set()
    assert running.result(WAIT).step == 1
    assert [reason(future) for future in waiting] == ["WRONG_RUN"] * 2
    assert (restored.result(WAIT).lineage, restored.result(WAIT).step) == (2, 0)
    assert rig.trainer.trained == [(1, 1)]


def one_known_and_one_running(rig: Rig, engine: Engine) -> tuple[SessionRef, StepAnswer, Future[StepAnswer]]:
    """Train step 1, and hold step 2 at the device: the session, the answer and the running step's future."""
    session = open_session(engine)
    first = engine.train_step(StepRequest(payload(1), session, 1, "one")).result(WAIT)
    rig.trainer.gate.clear()
    rig.trainer.entered = threading.Semaphore(0)
    running = engine.train_step(StepRequest(payload(2), session, 2, "two"))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    return session, first, running


@pytest.mark.parametrize("step", [None, 1], ids=["by its id", "by its step"])
def test_a_known_step_is_answered_though_the_queue_is_full(rig: Rig, step: int | None) -> None:
    engine = rig.start(serve={"queue_limit": 1})
    session, first, running = one_known_and_one_running(rig, engine)
    queued = engine.train_step(StepRequest(payload(3), session, 3, "three"))
    assert reason(engine.train_step(StepRequest(payload(4), session, 4, "four"))) == "QUEUE_FULL"
    again = engine.train_step(StepRequest(payload(1), session, step, "one")).result(WAIT)
    assert (again.replayed, again.step, again.digest) == (True, 1, first.digest)
    joined = engine.train_step(StepRequest(payload(2), session, 2, "two"))
    rig.trainer.gate.set()
    assert joined.result(WAIT) == running.result(WAIT)
    assert queued.result(WAIT).step == 3


@pytest.mark.parametrize("step", [None, 1], ids=["by its id", "by its step"])
def test_a_known_step_is_answered_while_a_drain_waits_for_another(rig: Rig, step: int | None) -> None:
    engine = rig.start(checkpoints=NO_AUTOMATIC)
    session, first, running = one_known_and_one_running(rig, engine)
    drained: list[bool] = []
    draining = threading.Thread(target=lambda: drained.append(engine.drain(WAIT)))
    draining.start()
    wait_for(lambda: engine.status().state is RunState.DRAINING)
    assert reason(engine.train_step(StepRequest(payload(3), session, 3, "three"))) == "DRAINING"
    again = engine.train_step(StepRequest(payload(1), session, step, "one")).result(WAIT)
    assert (again.replayed, again.step, again.digest) == (True, 1, first.digest)
    joined = engine.train_step(StepRequest(payload(2), session, 2, "two"))
    rig.trainer.gate.set()
    draining.join(WAIT)
    assert drained == [True]
    assert joined.result(WAIT) == running.result(WAIT)
