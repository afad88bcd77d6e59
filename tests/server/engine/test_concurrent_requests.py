"""What the pipeline must never train, and what must not keep it from answering."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from counter import FAIL_ID, CounterTrainer
from rig import WAIT, Rig, bare, open_session, payload, reason, reason_of, wait_for

from maskwire.v1.values import RunState
from maskwire_server import failpoints
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused
from maskwire_server.requests import (
    DownloadRequest,
    EvalRequest,
    RestoreRequest,
    SaveRequest,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import EvalOptions, SessionAnswer

LONG = {"every_seconds": 1e9, "keep_last": 3}


def open_beside_a_failing_step(rig: Rig, second: StepRequest) -> tuple[Any, Future[SessionAnswer]]:
    """A step that fails on the device with another behind it, and a session opened before it does."""
    engine = rig.engines[-1]
    rig.trainer.gate.clear()
    failing = engine.train_step(StepRequest(payload(1, FAIL_ID), second.session))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    behind = engine.train_step(second)
    opening = engine.open_session(SessionRequest("writer", "nonce-2", takeover=True))
    wait_for(lambda: engine.status().writer == "writer")
    rig.trainer.gate.set()
    assert reason(failing) == "INTERNAL"
    return behind, opening


def test_a_bare_step_behind_a_session_is_not_trained_inside_it(rig: Rig) -> None:
    engine = rig.start()
    behind, opening = open_beside_a_failing_step(rig, bare(2))
    assert reason(behind) == "WRITER_PRESENT"
    assert opening.result(WAIT).step == 0
    assert rig.trainer.trained == []
    assert engine.status().step == 0


def test_a_step_of_a_fenced_session_is_not_trained_inside_the_next(rig: Rig) -> None:
    engine = rig.start()
    old = open_session(engine, "old", "nonce-1")
    behind, opening = open_beside_a_failing_step(rig, StepRequest(payload(2), old))
    assert reason(behind) == "FENCED"
    assert opening.result(WAIT).step == 0
    assert rig.trainer.trained == []


def test_a_session_that_takes_long_to_open_is_not_idle_meanwhile(rig: Rig) -> None:
    now = [100.0]
    engine = rig.start(clock=lambda: now[0], serve={"session_idle_seconds": 60.0})
    rig.trainer.gate.clear()
    running = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    opening = engine.open_session(SessionRequest("writer", "nonce"))
    wait_for(lambda: engine.status().writer == "writer")
    now[0] += 61.0  # the running step keeps the session from being recorded for longer than it may be idle
    intruder = engine.train_step(bare(2))
    rig.trainer.gate.set()
    assert reason(intruder) == "WRITER_PRESENT"
    assert running.result(WAIT).step == 1
    assert opening.result(WAIT).step == 1
    now[0] += 59.0
    assert engine.status().writer == "writer", "its idle time starts with the answer"
    now[0] += 2.0
    assert engine.status().writer == ""
    assert engine.train_step(bare(3)).result(WAIT).step == 2


@contextlib.contextmanager
def no_open_files() -> Iterator[None]:
    """The process may open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(each.name) for each in Path("/proc/self/fd").iterdir()) + 1, hard)
    )
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def test_without_open_files_one_request_is_refused_and_the_run_goes_on(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    with no_open_files():
        refusals = [
            reason_of(lambda: engine.save(SaveRequest("two"))),
            reason_of(lambda: engine.restore(RestoreRequest("one"))),
            reason_of(lambda: engine.delete("one")),
        ]
        trained = engine.train_step(bare(2)).result(WAIT)
        with pytest.raises(OSError, match="Too many open files"):
            engine.checkpoints()
        with pytest.raises(OSError, match="Too many open files"):
            list(engine.download(DownloadRequest("one")))
        newest = engine.status().newest_checkpoint
    assert refusals == ["OUT_OF_RESOURCES"] * 3
    assert trained.step == 2
    assert newest is not None
    assert newest.name == "one"
    assert rig.fatal == []
    assert [info.name for info in engine.checkpoints()] == ["one", "step-000000000"]
    assert engine.restore(RestoreRequest("one")).result(WAIT).step == 1


def test_a_checkpoint_that_cannot_be_opened_for_want_of_files_is_not_damaged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    engine.close()
    checkpoints = Checkpoints(rig.folder)
    manifest = checkpoints.get("one")
    with no_open_files():
        for look in (checkpoints.all, checkpoints.unreadable, lambda: checkpoints.damage(manifest)):
            with pytest.raises(OSError, match="Too many open files"):
                look()
    assert checkpoints.damage(manifest) is None


def test_a_want_of_memory_refuses_one_evaluation(rig: Rig) -> None:
    class Short(CounterTrainer):
        def eval_loss(self, *_: Any) -> Any:
            raise MemoryError

    engine = rig.start(Short)
    asked = engine.eval_loss(EvalRequest(payload(1).batch, EvalOptions(row_ids=(0, 1))))
    assert reason(asked) == "OUT_OF_RESOURCES"
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    assert rig.fatal == []


def test_another_error_of_the_disk_fails_the_request_that_met_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "named", broken)
        with pytest.raises(OSError, match="Input/output error"):
            engine.save(SaveRequest("a"))
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    assert rig.fatal == []


class Held:
    """Something on another thread that goes on only when it is told to."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(WAIT)


def refused_while_restoring(engine: Engine) -> None:
    """Every request is answered, and by its name."""
    status = engine.status()
    assert status.state is RunState.RESTORING
    assert reason_of(lambda: engine.train_step(bare(5))) == "RESTORING"
    assert reason_of(lambda: engine.open_session(SessionRequest("me", "n"))) == "RESTORING"
    assert reason_of(lambda: engine.save(SaveRequest("x"))) == "RESTORING"
    assert reason_of(lambda: engine.restore(RestoreRequest("one"))) == "RESTORING"
    assert {info.name for info in engine.checkpoints()} >= {"one"}
    assert b"".join(chunk.data for chunk in engine.download(DownloadRequest("one")))


def test_requests_are_answered_while_a_restore_reads_its_files(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1, "first")).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    engine.train_step(bare(2)).result(WAIT)
    held, damage = Held(), Checkpoints.damage

    def slow(self: Checkpoints, manifest: Any) -> str | None:
        held()
        return damage(self, manifest)

    monkeypatch.setattr(Checkpoints, "damage", slow)
    restoring = engine.restore(RestoreRequest("one"))
    assert held.reached.wait(WAIT)
    refused_while_restoring(engine)
    assert engine.train_step(bare(1, "first")).result(WAIT).replayed
    held.go_on.set()
    assert restoring.result(WAIT).lineage == 2
    assert engine.train_step(bare(3)).result(WAIT).step == 2


def test_requests_are_answered_while_a_restore_loads_its_weights(rig: Rig) -> None:
    held = Held()

    class Slow(CounterTrainer):
        slow = False

        def load(self, folder: Path) -> None:
            if self.slow:
                held()
            super().load(folder)

    engine = rig.start(Slow, checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    engine.train_step(bare(2, "second")).result(WAIT)
    rig.trainer.slow = True  # type: ignore[attr-defined]
    restoring = engine.restore(RestoreRequest("one"))
    assert held.reached.wait(WAIT)
    refused_while_restoring(engine)
    assert (engine.status().lineage, engine.status().step) == (2, 1)
    assert reason(engine.train_step(bare(2, "second"))) == "WRONG_RUN", "it is not in the history any more"
    held.go_on.set()
    answered = restoring.result(WAIT)
    assert (answered.lineage, answered.step) == (2, 1)
    assert engine.train_step(bare(3)).result(WAIT).step == 2


def test_a_damaged_checkpoint_is_refused_and_training_goes_on_where_it_was(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    (rig.folder / "checkpoints" / "one" / "state.json").write_text("{}")
    assert reason(engine.restore(RestoreRequest("one"))) == "CHECKPOINT_DAMAGED"
    assert engine.status().state is RunState.SERVING
    answered = engine.train_step(bare(2)).result(WAIT)
    assert (answered.step, engine.status().lineage) == (2, 1)


def test_a_drain_does_not_wait_for_a_restore_that_reads_its_files(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    held, damage = Held(), Checkpoints.damage

    def slow(self: Checkpoints, manifest: Any) -> str | None:
        held()
        return damage(self, manifest)

    monkeypatch.setattr(Checkpoints, "damage", slow)
    restoring = engine.restore(RestoreRequest("one"))
    assert held.reached.wait(WAIT)
    assert engine.drain(WAIT)
    held.go_on.set()
    assert reason(restoring) == "DRAINING"
    assert engine.status().lineage == 1


def test_a_deletion_of_large_files_keeps_nobody_waiting(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for name in ("one", "two", "three"):
        engine.train_step(bare(len(name))).result(WAIT)
        engine.save(SaveRequest(name)).result(WAIT)
    held = Held()
    failpoints.install(lambda place: held() if place == "checkpoint.undone" else None)
    try:
        deleting = engine.delete("one")
        assert held.reached.wait(WAIT)
        assert reason_of(lambda: engine.restore(RestoreRequest("one"))) == "CHECKPOINT_NOT_FOUND"
        with pytest.raises(Refused, match="no checkpoint"):
            list(engine.download(DownloadRequest("one")))
        assert b"".join(chunk.data for chunk in engine.download(DownloadRequest("two")))
        assert engine.train_step(bare(9)).result(WAIT).step == 4
        assert "one" not in {info.name for info in engine.checkpoints()}
    finally:
        failpoints.install(None)
        held.go_on.set()
    deleting.result(WAIT)
    assert not (rig.folder / "checkpoints" / "one").exists()
