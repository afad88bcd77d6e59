"""What the mirror must have before a run is served, whatever a start was interrupted by."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from counter import CounterTrainer
from mirrors import MirroredRig, down, lose_the_machine, mirror, segments, train
from rig import WAIT, Rig, wait_for

from maskwire_server import config
from maskwire_server.engine import mirror as engine_mirror
from maskwire_server.engine import startup
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.uploaded_commit import UploadedCommit
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import resume
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.recovery import imported_run

NEVER = {"every_steps": 1000}


@pytest.fixture(params=["local", "mirrored"])
def rig(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MirroredRig]:
    monkeypatch.setattr(engine_mirror, "START_RETRY_SECONDS", 0.05)
    made = MirroredRig(tmp_path, request.param)
    yield made
    made.close()


class Other(CounterTrainer):
    """Computes other states and losses than the trainer of the run: a replay by it is inexact."""

    def train_step(self, *given: Any) -> Any:
        self.state = hashlib.sha256(self.state.encode()).hexdigest()
        return super().train_step(*given)


def start_that_waits(rig: MirroredRig, upload: str, **options: Any) -> Engine:
    """Start while checkpoints cannot be uploaded; returns once the start waits for it."""
    engine = rig.start(wait=False, **options)
    wait_for(lambda: f"cannot write checkpoints/{upload}" in engine.status().waiting_for)
    return engine


def test_imported_weights_are_in_the_mirror_before_a_step_is_trained(rig: MirroredRig) -> None:
    def imported() -> CounterTrainer:
        trainer = CounterTrainer()
        trainer.state = "weights that no seed makes"
        return trainer

    chosen = config.load(None)
    imported_run.begin(
        rig.folder / "run", imported, chosen.as_json(), seed=chosen.run.seed, canonical=chosen.canonical(),
        versions={}, labels={}, texts={},
    )  # fmt: skip
    with down("put_file"):
        engine = start_that_waits(rig, "imported")
    engine.wait_serving(WAIT)
    train(engine, 3)
    wait_for(lambda: mirror(engine).step == 3)
    digest = engine.status().digest
    with down():
        lose_the_machine(rig, engine)
    assert rig.restore("run")
    again = rig.start()
    assert (again.status().durable_step, again.status().digest) == (3, digest)


def test_the_state_after_an_inexact_replay_is_in_the_mirror_although_the_start_that_saved_it_was_killed(
    rig: MirroredRig,
) -> None:
    engine = rig.start(checkpoints=NEVER)
    train(engine, 3)
    wait_for(lambda: mirror(engine).step == 3)
    engine.close()
    with down("put_file"):
        start_that_waits(
            rig, "accepted", trainer=Other, accept_inexact_replay=True, checkpoints=NEVER
        ).close()
        third = start_that_waits(rig, "accepted", trainer=Other, checkpoints=NEVER)
    third.wait_serving(WAIT)
    train(third, 2, first=3)
    wait_for(lambda: mirror(third).step == 5)
    digest = third.status().digest
    with down():
        lose_the_machine(rig, third)
    assert rig.restore("run")
    again = rig.start(trainer=Other)
    assert (again.status().durable_step, again.status().digest) == (5, digest)


class Killed(BaseException):
    """Ends a start as a kill would."""


def test_a_disk_that_is_full_after_an_upload_leads_to_one_segment_and_a_kill_then_to_no_fence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "RETRY_SECONDS", 0.05)
    rig = MirroredRig(tmp_path, "local")
    engine = rig.start()
    train(engine, 2)
    wait_for(lambda: mirror(engine).step == 2)
    with down():
        train(engine, 3, first=2)
        engine.close()
    before = len(segments(rig))
    written: list[int] = []

    def full(self: UploadedCommit, _: Journal) -> None:
        written.append(self.last)
        if len(written) < 3:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        raise Killed

    rig.acknowledge = "mirrored"
    with monkeypatch.context() as patch:
        patch.setattr(UploadedCommit, "write", full)
        killed = rig.start(wait=False)
        wait_for(lambda: len(written) == 3)
        killed.close()
    assert len(segments(rig)) == before + 2, "that of the start, and one with the three steps"
    with closing(Journal(rig.folder / "run")) as journal:
        resume(journal, rig.store, "mirrored")
        assert not journal.outbox.page(0, 2**30).changes


@pytest.mark.parametrize("whole", [False, True])
def test_an_upload_of_the_killed_process_that_arrives_during_the_next_start_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Also if the next start uploads the whole journal again, as after a migration."""
    rig = MirroredRig(tmp_path)
    with closing(Journal(tmp_path / "run")) as journal:
        journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
        killed = resume(journal, rig.store, "local")
        killed.compose(journal.outbox.page(0, 2**30))
        assert killed.pending is not None
        number, late = killed.pending.number, killed._data
        create: Callable[[ObjectStore, str, bytes], None] = ObjectStore.create

        def late_first(store: ObjectStore, name: str, data: bytes) -> None:
            if int(name.rpartition("/")[2]) == number:
                create(store, name, late)
            create(store, name, data)

        if whole:
            monkeypatch.setattr(type(journal.outbox), "is_current", property(lambda _: False))
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "create", late_first)
            writer = resume(journal, rig.store, "local")
        assert writer.number == number + 1
        assert [segment.instance for segment in segments(rig)][-2:] == [killed.instance, writer.instance]
        assert bool(journal.outbox.page(0, 2**30).changes) == whole


def test_what_is_uploaded_before_serving_is_counted(tmp_path: Path) -> None:
    alone = Rig(tmp_path / "run").start()
    train(alone, 5)
    alone.drain(WAIT)
    alone.close()
    rig = MirroredRig(tmp_path, "mirrored")
    found = mirror(rig.start())
    rig.close()
    sent = sum(size for each in segments(rig) for batches in each.batches for _, size in batches.steps)
    assert found.uploaded_bytes == sent > 0
