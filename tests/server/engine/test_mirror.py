"""A served run and its mirror: what is answered when, outages, takeovers, and what is deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counter import CounterTrainer
from mirrors import MirroredRig, down, lose_the_machine, mirror, restored, tables, train
from rig import WAIT, Rig, bare, open_session, payload, reason, reason_of, wait_for

from maskwire.v1.values import Losses, RunState
from maskwire_server.engine import checkpoint_uploader
from maskwire_server.engine import mirror as engine_mirror
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import FencedError, Refused, StoreError
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import (
    EvalRequest,
    RestoreRequest,
    SaveRequest,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import EvalOptions, StepResult
from maskwire_server.step_listing import StepsRequest


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_mirror, checkpoint_uploader):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(engine_mirror, "START_RETRY_SECONDS", 0.05)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path, "mirrored")
    yield rig
    rig.close()


def held_back(future: Future[Any]) -> bool:
    with pytest.raises(TimeoutError):
        future.result(0.1)
    return True


def test_training_goes_on_without_the_store_and_catches_up(local: MirroredRig) -> None:
    engine = local.start()
    train(engine, 2)
    wait_for(lambda: mirror(engine).step == 2)
    with down():
        train(engine, 5, first=2)
        wait_for(lambda: bool(mirror(engine).problem))
        assert engine.status().state is RunState.SERVING
        assert mirror(engine).step == 2
        assert engine.status().durable_step == 7
    wait_for(lambda: mirror(engine).step == 7 and not mirror(engine).problem)
    assert mirror(engine).failures > 0


def test_what_was_acknowledged_locally_and_not_uploaded_is_lost_and_named(local: MirroredRig) -> None:
    engine = local.start()
    train(engine, 3)
    wait_for(lambda: mirror(engine).step == 3)
    session = open_session(engine, "job", "nonce")
    with down():
        train_in(engine, session, 4, 2)
        lose_the_machine(local, engine)
    assert local.restore("run")
    again = local.start()
    assert again.status().durable_step == 3
    assert "steps from 4 on that were acknowledged after that are lost" in mirror(again).restored
    history = engine.status()
    remembers = HistoryPosition(history.run_id, 1, history.durable_step, history.digest)
    request = SessionRequest("job", "other", history=remembers)
    assert reason_of(lambda: again.open_session(request)) == "HISTORY_LOST"


def train_in(engine: Engine, session: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        request = StepRequest(payload(step), session=session, step=step, request_id=f"numbered-{step}")
        engine.train_step(request).result(WAIT)


def test_no_answer_is_given_before_the_mirror_has_what_it_says(mirrored: MirroredRig) -> None:
    engine = mirrored.start()
    train(engine, 2)
    evaluation = EvalRequest(payload(5).batch, EvalOptions((1, 2)))
    with down():
        step = engine.train_step(bare(2, "step-2"))
        assert held_back(step)
        wait_for(lambda: engine.status().state is RunState.HELD)
        assert "the store is down" in engine.status().waiting_for
        assert engine.status().durable_step == 2
        assert reason_of(lambda: engine.train_step(bare(3, "step-3"))) == "HELD"
        assert reason_of(lambda: engine.eval_loss(evaluation)) == "HELD"
        retry = engine.train_step(bare(2, "step-2"))
        assert held_back(retry)
        assert reason(engine.list_steps(StepsRequest(10))) == "HELD"
        assert reason_of(lambda: engine.open_session(SessionRequest("job", "nonce"))) == "HELD"
    assert step.result(WAIT).step == retry.result(WAIT).step == 3
    wait_for(lambda: engine.status().state is RunState.SERVING)
    page = engine.list_steps(StepsRequest(10)).result(WAIT)
    assert [recorded.step for recorded in page.steps] == [1, 2, 3]
    assert engine.eval_loss(evaluation).result(WAIT).step == 3


def test_what_is_asked_while_an_upload_is_slow_is_answered_after_it(
    mirrored: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = mirrored.start()
    gate, create = threading.Event(), ObjectStore.create

    def slow(store: ObjectStore, name: str, data: bytes) -> None:
        gate.wait(WAIT)
        create(store, name, data)

    monkeypatch.setattr(ObjectStore, "create", slow)
    step = engine.train_step(bare(1, "one"))
    assert held_back(step)
    asked = engine.list_steps(StepsRequest(10))
    evaluated = engine.eval_loss(EvalRequest(payload(5).batch, EvalOptions((1, 2))))
    assert held_back(asked)
    assert held_back(evaluated)
    gate.set()
    assert [recorded.step for recorded in asked.result(WAIT).steps] == [1]
    assert evaluated.result(WAIT).step == step.result(WAIT).step == 1


def test_a_checkpoint_is_answered_and_listed_once_it_is_uploaded(mirrored: MirroredRig) -> None:
    engine = mirrored.start()
    train(engine, 1)
    with down("put_file"):
        saved = engine.save(SaveRequest("named", "id"))
        assert held_back(saved)
        again = engine.save(SaveRequest("named", "id"))
        assert held_back(again)
        shown = engine.checkpoints()
        assert "named" not in [info.name for info in shown]
        assert engine.status().newest_checkpoint == shown[0]
        wait_for(lambda: "the store is down" in mirror(engine).problem)
        assert engine.status().state is RunState.SERVING
    assert saved.result(WAIT).name == again.result(WAIT).name == "named"
    assert engine.status().newest_checkpoint == engine.checkpoints()[0]
    assert engine.checkpoints()[0].name == "named"


def test_nothing_acknowledged_is_lost_with_the_machine(mirrored: MirroredRig) -> None:
    engine = mirrored.start(checkpoints={"every_steps": 4})
    train(engine, 10)
    session = open_session(engine, "job", "nonce")
    before = engine.status()
    lose_the_machine(mirrored, engine)
    assert mirrored.restore("run")
    again = mirrored.start()
    after = again.status()
    assert (after.durable_step, after.digest, after.epoch) == (10, before.digest, session.epoch)
    assert mirror(again).restored.endswith("no acknowledged step is lost")
    replayed = again.train_step(bare(4, "step-4"))
    assert reason(replayed) == "WRITER_PRESENT"
    request = StepRequest(payload(5), session=session, step=11, request_id="next")
    assert again.train_step(request).result(WAIT).step == 11


def test_what_was_recorded_but_not_uploaded_before_a_crash_is_uploaded_before_serving(
    mirrored: MirroredRig,
) -> None:
    engine = mirrored.start()
    train(engine, 1)
    with down():
        unknown = engine.train_step(bare(1, "step-1"))
        wait_for(lambda: engine.status().state is RunState.HELD)
        engine.close()
        assert isinstance(unknown.exception(WAIT), Refused)
        again = mirrored.start(wait=False)
        wait_for(lambda: "the store is down" in again.status().waiting_for)
        assert again.status().state is RunState.RECOVERING
    again.wait_serving(WAIT)
    assert mirror(again).step == 2
    answer = again.train_step(bare(1, "step-1")).result(WAIT)
    assert (answer.step, answer.replayed) == (2, True)


def test_a_state_that_no_replay_gives_again_is_in_the_mirror_before_it_is_served(
    mirrored: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drifting(CounterTrainer):
        def train_step(self, *given: Any) -> StepResult:
            result = super().train_step(*given)
            return replace(result, losses=Losses(result.losses.loss + 1))

    engine = mirrored.start()
    train(engine, 2)
    engine.close()
    monkeypatch.setattr(
        checkpoint_uploader.CheckpointUploader, "_copy", lambda _: None
    )  # it comes later, if at all
    again = mirrored.start(trainer=Drifting, accept_inexact_replay=True)
    assert mirror(again).checkpoint.startswith("accepted-")


@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_the_first_of_two_servers_ends_with_its_next_segment(tmp_path: Path, acknowledge: str) -> None:
    rig = MirroredRig(tmp_path, acknowledge)
    first = rig.start()
    train(first, 3)
    wait_for(lambda: mirror(first).step == 3)
    assert rig.restore("other")
    second = rig.start("other")
    train(second, 1, first=3)
    late = first.train_step(bare(9, "late"))
    wait_for(lambda: bool(rig.fatal))
    assert isinstance(rig.fatal[0], FencedError)
    if acknowledge == "mirrored":
        assert isinstance(late.exception(WAIT), Refused)
    assert second.status().durable_step == 4
    train(second, 1, first=4)
    wait_for(lambda: mirror(second).step == 5)
    rig.close()
    assert rig.restore("third")
    third = rig.start("third")
    assert (third.status().durable_step, third.status().digest) == (5, second.status().digest)
    third.close()


def test_what_a_lineage_starts_from_is_in_the_mirror_before_the_lineage(
    local: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = local.start(checkpoints={"every_steps": 2, "keep_last": 2})
    with down("put_file"):
        train(engine, 3)
        engine.save(SaveRequest("three")).result(WAIT)
        train(engine, 6, first=3)
        wait_for(lambda: mirror(engine).step == 9)
        engine.restore(RestoreRequest("three", "id")).result(WAIT)
        wait_for(lambda: mirror(engine).lineage == 1 and bool(mirror(engine).problem))
        lose_the_machine(local, engine)
    assert local.restore("run")
    again = local.start()
    assert (again.status().lineage, again.status().durable_step) == (1, 9)


def test_the_mirror_keeps_two_checkpoints_and_the_batches_after_the_older_one(local: MirroredRig) -> None:
    engine = local.start(checkpoints={"every_steps": 3, "keep_last": 2})
    for first in range(0, 18, 3):
        train(engine, 3, first=first)
        wait_for(lambda step=first + 3: mirror(engine).checkpoint == f"step-{step:09d}")  # type: ignore[misc]
    folder = local.folder / "mirror"
    wait_for(lambda: len(list((folder / "checkpoints").glob("*/manifest.json"))) == 2)

    def steps() -> set[int]:
        names = [path.name.split("-") for path in (folder / "batches").iterdir()]
        return {step for name in names for step in range(int(name[2]), int(name[3]) + 1)}

    wait_for(lambda: min(steps()) > 15)
    assert steps() == {16, 17, 18}
    lose_the_machine(local, engine)
    assert local.restore("run")
    newest = sorted((folder / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_bytes(newest.read_bytes().replace(b'"state"', b'"staTe"'))
    again = local.start()
    assert again.status().durable_step == 18, "the older one and the batches after it are enough"


def test_a_mirror_that_is_turned_off_and_on_again_has_everything(local: MirroredRig, tmp_path: Path) -> None:
    engine = local.start()
    train(engine, 2)
    engine.save(SaveRequest("deleted")).result(WAIT)
    for name in ("kept", "kept-too"):
        engine.save(SaveRequest(name)).result(WAIT)
    engine.drain(WAIT)
    engine.close()
    alone = Rig(tmp_path / "run").start()
    alone.delete("deleted").result(WAIT)
    train(alone, 2, first=2)
    wait_for(lambda: alone._catalogue.is_recorded)
    alone.close()
    engine = local.start()
    train(engine, 2, first=4)
    engine.drain(WAIT)
    engine.close()
    assert local.restore("other")
    original, restored = tables(tmp_path / "run"), tables(tmp_path / "other")
    original.pop("payloads")
    restored.pop("payloads")
    assert restored == original
    assert len(original["steps"]) == 6


def test_ids_survive_as_they_are(mirrored: MirroredRig) -> None:
    """A request id with every kind of character that one may have."""
    engine = mirrored.start()
    odd = "\"'\\{}[]é✓" + "x" * 100
    first = engine.train_step(bare(1, odd)).result(WAIT)
    lose_the_machine(mirrored, engine)
    assert mirrored.restore("run")
    again = mirrored.start().train_step(bare(1, odd)).result(WAIT)
    assert again.replayed
    assert np.array_equal([again.step, *again.digest], [first.step, *first.digest])


def test_a_restore_that_waits_for_the_mirror_holds_up_no_shutdown(mirrored: MirroredRig) -> None:
    engine = mirrored.start()
    train(engine, 2)
    engine.save(SaveRequest("named")).result(WAIT)
    train(engine, 2, first=2)
    with down():
        waiting = engine.restore(RestoreRequest("named", "id"))
        wait_for(lambda: engine.status().state is RunState.HELD)
        assert engine.drain(WAIT)
        assert reason(waiting) == "DRAINING"
    engine.close()
    again = mirrored.start()
    answer = again.restore(RestoreRequest("named", "id")).result(WAIT)
    assert (answer.lineage, answer.step) == (again.status().lineage, 2)


def test_a_clean_stop_uploads_the_rest_although_an_earlier_upload_failed(
    local: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine_mirror, checkpoint_uploader):
        monkeypatch.setattr(module, "RETRY_SECONDS", 1000.0)
    engine = local.start()
    train(engine, 2)
    wait_for(lambda: mirror(engine).step == 2)
    with down():
        train(engine, 3, first=2)
        wait_for(lambda: bool(mirror(engine).problem))
    assert engine.drain(WAIT)
    lose_the_machine(local, engine)
    assert restored(local, "run").startswith("step 5 ")


def test_a_clean_stop_tries_again_when_a_request_fails(
    local: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = local.start(segment_seconds=1000.0, serve={"drain_seconds": 3600.0})
    wait_for(lambda: bool(mirror(engine).checkpoint))
    train(engine, 5)
    create, failures = ObjectStore.create, [StoreError("503 Slow Down")] * 2

    def sometimes(store: ObjectStore, name: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        create(store, name, data)

    monkeypatch.setattr(ObjectStore, "create", sometimes)
    assert engine.drain(WAIT)
    assert not failures
    lose_the_machine(local, engine)
    assert restored(local, "run").startswith("step 5 ")


@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_a_stop_waits_for_few_attempts_while_the_store_is_down(tmp_path: Path, acknowledge: str) -> None:
    rig = MirroredRig(tmp_path, acknowledge)
    engine = rig.start(serve={"drain_seconds": 3600.0})
    with down():
        assert engine.drain(WAIT), "long before serve.drain_seconds"
    rig.close()
