"""What a start does with a run directory that is not as it should be."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from counter import NAN_ID, CounterTrainer
from rig import WAIT, FullDisk, Rig, bare, open_session, payload, reason, wait_for

from maskwire.v1.values import RunState
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine import committer
from maskwire_server.engine.committer import Reserve
from maskwire_server.errors import RunDirectoryError, Unwanted
from maskwire_server.journal import reserve
from maskwire_server.journal.journal import Journal
from maskwire_server.recovery import verify
from maskwire_server.requests import EvalRequest, RestoreRequest, SaveRequest, SessionRequest, StepRequest
from maskwire_server.results import EvalOptions

LONG = {"every_seconds": 1e6}


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    yield
    failpoints.install(None)


def change(run_dir: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(run_dir / "journal.sqlite")) as journal:
        assert journal.execute(statement, values).rowcount == 1
        journal.commit()


def close(rig: Rig) -> None:
    rig.engines.pop().close()


def test_a_kept_batch_that_was_changed_is_named_and_never_trained_on(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    close(rig)
    with contextlib.closing(sqlite3.connect(rig.folder / "journal.sqlite")) as journal:
        whole = journal.execute("SELECT payload FROM payloads WHERE step = 2").fetchone()[0]
    for at in (0, 5, len(whole) - 1):  # version, header, the last id
        damaged = bytearray(whole)
        damaged[at] ^= 64
        change(rig.folder, "UPDATE payloads SET payload = ? WHERE step = 2", bytes(damaged))
        for accept in (False, True):
            with pytest.raises(RunDirectoryError, match=r"the batch of step 2 .* does not match its hash"):
                rig.start(accept_inexact_replay=accept)
        found = verify.verify(rig.folder)
        assert any("the batch of step 2" in problem for problem in found.problems)
        with pytest.raises(RunDirectoryError, match="does not match its hash"):
            verify.inspect(rig.folder, 2)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE steps SET outcome = 9 WHERE step = 3", "step 3 .* does not match its hash"),
        ("UPDATE steps SET numbers = x'00' WHERE step = 3", "step 3 .* does not match its hash"),
        ("UPDATE steps SET payload_hash = 'x' WHERE step = 2", "step 2 .* does not match its hash"),
        ("UPDATE events SET body = replace(body, 'adamw', 'adamx') WHERE kind = 'configuration'", "event"),
        ("DELETE FROM events WHERE kind = 'configuration'", "event"),
    ],
)
def test_every_row_that_was_changed_is_named(rig: Rig, statement: str, words: str) -> None:
    engine = rig.start()
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    close(rig)
    change(rig.folder, statement)
    with pytest.raises(RunDirectoryError, match=words):
        rig.start()
    if "steps" in statement:
        assert any("does not match its hash" in problem for problem in verify.verify(rig.folder).problems)


def test_a_page_that_was_overwritten_is_no_traceback(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(200):
        engine.train_step(bare(seed)).result(WAIT)
    close(rig)
    path = rig.folder / "journal.sqlite"
    data = bytearray(path.read_bytes())
    for page in range(8, len(data) // 4096):
        data[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(RunDirectoryError, match="restore the run directory from a copy"):
        rig.start()
    assert verify.verify(rig.folder).problems


def test_a_parents_last_records_are_missed(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for seed in range(4):
        engine.train_step(bare(seed)).result(WAIT)
    engine.save(SaveRequest("four")).result(WAIT)
    engine.restore(RestoreRequest("four")).result(WAIT)
    close(rig)
    change(rig.folder, "DELETE FROM steps WHERE lineage = 1 AND step = 4")
    for name in ("four", "step-000000004-lineage-2"):
        shutil.rmtree(rig.folder / "checkpoints" / name, ignore_errors=True)
    with pytest.raises(RunDirectoryError, match=r"step 4 \(lineage 1\) is missing, although"):
        rig.start()


def test_a_journal_that_lost_a_lineage_is_found_and_its_loss_can_be_accepted(
    rig: Rig, tmp_path: Path
) -> None:
    engine = rig.start(checkpoints=LONG)
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    engine.save(SaveRequest("three")).result(WAIT)
    close(rig)
    shutil.copytree(rig.folder, tmp_path / "older")
    engine = rig.start(checkpoints=LONG)
    session = open_session(engine)
    engine.restore(RestoreRequest("three")).result(WAIT)
    engine.train_step(bare(9)).result(WAIT)
    engine.save(SaveRequest("lost")).result(WAIT)
    close(rig)
    for path in rig.folder.glob("journal*"):
        path.unlink()
    shutil.copy(tmp_path / "older" / "journal.sqlite", rig.folder)
    with pytest.raises(RunDirectoryError, match=r"'lost': it holds step 4 \(lineage 2\), which the journal"):
        rig.start()
    with pytest.raises(RunDirectoryError, match="the run is at step 3; name that step"):
        rig.start(accept_lost_history=4)
    engine = rig.start(accept_lost_history=3)
    status = engine.status()
    assert (status.lineage, status.step) == (2, 3)
    assert (rig.folder / "checkpoints" / "lost.aside").is_dir()
    assert reason(engine.train_step(StepRequest(payload(1), session))) == "WRONG_RUN"
    trained = engine.train_step(bare(1)).result(WAIT)
    close(rig)
    with pytest.raises(RunDirectoryError, match="the run is at step 4"):
        rig.start(accept_lost_history=3)
    assert rig.start().status().digest == trained.digest, "without the option it goes on"


def test_accepting_a_loss_twice_opens_one_lineage(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    for _ in range(2):
        close(rig)
        assert rig.start(accept_lost_history=1).status().lineage == 2


def test_a_checkpoint_of_a_lineage_that_the_journal_does_not_know_is_not_restored(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    manifest = Checkpoints(rig.folder).get("one")
    stranger = Checkpoints(rig.folder)
    engine.train_step(bare(2)).result(WAIT)
    info = manifest.info

    class Copy:
        def write(self, folder: Path) -> None:
            shutil.copy(stranger.path("one") / "state.json", folder)

    for name, changes in (("lineage", {"lineage": 2}), ("digest", {"digest": bytes(32)})):
        stranger.write(
            Copy(),
            type(manifest)(
                **{**vars(manifest), "info": type(info)(**{**vars(info), "name": name, **changes})}
            ),
        )
        assert reason(engine.restore(RestoreRequest(name))) == "CHECKPOINT_DAMAGED"
        stranger.delete(name)
    assert engine.train_step(bare(3)).result(WAIT).step == 3


def test_an_inexact_replay_is_accepted_once_and_for_all(rig: Rig) -> None:
    class Other(CounterTrainer):
        def __init__(self) -> None:
            super().__init__()
            self.state = "0" * 64

    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    close(rig)
    shutil.rmtree(rig.folder / "checkpoints")
    rig.start(Other, accept_inexact_replay=True).train_step(bare(2)).result(WAIT)
    state = rig.trainer.state
    close(rig)
    engine = rig.start(Other)
    assert rig.trainer.state == state, "a checkpoint covers what was accepted"
    assert engine.checkpoints()[0].name.startswith("accepted-000000001-")


def test_a_checkpoint_holds_the_step_that_it_says_whatever_the_device_did_meanwhile(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(0)).result(WAIT)
    transaction, full = Journal.transaction, [True]

    def limited(self: Journal, write: object) -> None:
        if full[0]:
            raise FullDisk("database or disk is full")
        transaction(self, write)  # type: ignore[arg-type]

    rig.trainer.gate.clear()
    steps = [engine.train_step(bare(1))]
    wait_for(lambda: len(rig.trainer.trained) == 1)
    saved = engine.save(SaveRequest("two"))
    steps.append(engine.train_step(bare(2)))
    monkeypatch.setattr(Journal, "transaction", limited)
    rig.trainer.gate.set()
    wait_for(lambda: engine.status().state is RunState.HELD)
    full[0] = False
    info = saved.result(WAIT)
    assert [step.result(WAIT).step for step in steps] == [2, 3]
    assert (info.step, info.digest) == (2, steps[0].result().digest)
    final = rig.trainer.state
    close(rig)
    rig.start(checkpoints=LONG)
    assert rig.trainer.state == final


def test_fast_steps_beside_saves_leave_checkpoints_that_are_what_they_say(rig: Rig) -> None:
    engine = rig.start(
        checkpoints={"every_steps": 3, "keep_last": 1000}, serve={"keep_payloads": "all", "queue_limit": 300}
    )
    futures = [engine.train_step(bare(seed)) for seed in range(200)]
    assert [future.result(WAIT).step for future in futures] == list(range(1, 201))
    states = {}
    trainer = CounterTrainer()
    for step, seed in enumerate(range(200), 1):
        sent = payload(seed)
        trainer.train_step(1, step, sent.batch, sent.modes)
        states[step] = trainer.state
    close(rig)
    checked = 0
    for manifest in Checkpoints(rig.folder).all():
        if manifest.info.step:
            loaded = CounterTrainer()
            loaded.load(rig.folder / "checkpoints" / manifest.info.name)
            assert loaded.state == states[manifest.info.step], manifest.info.name
            checked += 1
    assert checked > 3


def test_a_damaged_checkpoint_is_no_cover(rig: Rig) -> None:
    engine = rig.start(checkpoints={**LONG, "keep_last": 2})
    for name in ("one", "two"):
        engine.train_step(bare(len(name))).result(WAIT)
        engine.save(SaveRequest(name)).result(WAIT)
    close(rig)
    (rig.folder / "checkpoints" / "two" / "state.json").write_text("{}")
    engine = rig.start(checkpoints={**LONG, "keep_last": 2})
    assert [info.name for info in engine.checkpoints()] == ["one", "step-000000000"]
    assert (rig.folder / "checkpoints" / "two.aside").is_dir()
    last = engine.train_step(bare(7)).result(WAIT)
    engine.save(SaveRequest("three")).result(WAIT)
    state = rig.trainer.state
    close(rig)
    for name in ("three",):
        (rig.folder / "checkpoints" / name / "state.json").write_text("{}")
    engine = rig.start()
    assert engine.status().digest == last.digest, "one was intact, and the batches after it were kept"
    assert rig.trainer.state == state


def test_the_second_newest_is_read_again_before_batches_go(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for name in ("one", "two"):
        engine.train_step(bare(len(name))).result(WAIT)
        engine.save(SaveRequest(name)).result(WAIT)
    close(rig)
    (rig.folder / "checkpoints" / "one" / "state.json").write_text("{}")  # not read by a start: two is newer
    engine = rig.start(checkpoints=LONG)
    (rig.folder / "checkpoints" / "step-000000000" / "state.json").write_text("{}")
    engine.train_step(bare(8)).result(WAIT)
    engine.save(SaveRequest("three")).result(WAIT)
    engine.train_step(bare(9)).result(WAIT)
    assert [info.name for info in engine.checkpoints()] == ["three", "two", "one", "step-000000000"]
    engine.train_step(bare(10)).result(WAIT)
    state = rig.trainer.state
    close(rig)
    (rig.folder / "checkpoints" / "three" / "state.json").write_text("{}")
    rig.start()
    assert rig.trainer.state == state


def test_the_log_is_merged_again_when_there_is_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    merge_log, calls = Journal.merge_log, [0]

    def failing(self: Journal, *, truncate: bool = False) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise FullDisk("database or disk is full")
        merge_log(self, truncate=truncate)

    monkeypatch.setattr(Journal, "merge_log", failing)
    monkeypatch.setattr(reserve, "MERGE_BYTES", 2**18)
    monkeypatch.setattr(committer, "RETRY_SECONDS", 0.0)
    for seed in range(60):
        engine.train_step(bare(seed)).result(WAIT)
    assert calls[0] >= 2
    assert engine.status().step == 60
    assert not rig.fatal


def test_a_disk_that_fills_up_while_draining_does_not_keep_the_server(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    rig.trainer.gate.clear()
    engine.train_step(bare(1))
    for _ in range(2):
        assert rig.trainer.entered.acquire(timeout=WAIT)

    def full(self: Journal, write: object) -> None:
        raise FullDisk("database or disk is full")

    monkeypatch.setattr(Journal, "transaction", full)
    failpoints.install(lambda name: rig.trainer.gate.set() if name == "drain.begun" else None)
    assert engine.drain(WAIT)


def test_a_restore_without_room_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    transaction, full = Journal.transaction, [True]

    def limited(self: Journal, write: object) -> None:
        if full[0]:
            raise FullDisk("database or disk is full")
        transaction(self, write)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "transaction", limited)
    assert reason(engine.restore(RestoreRequest("one"))) == "HELD"
    assert reason(engine.train_step(bare(1))) == "HELD"
    full[0] = False
    wait_for(lambda: engine.status().state is RunState.SERVING)
    assert engine.train_step(bare(1)).result(WAIT).step == 2
    assert engine.restore(RestoreRequest("one")).result(WAIT).lineage == 2


def test_a_halt_says_after_a_restart_what_it_waits_for(rig: Rig) -> None:
    engine = rig.start()
    for seed in range(3):
        engine.train_step(bare(seed, first=NAN_ID)).result(WAIT)
    close(rig)
    engine = rig.start()
    status = engine.status()
    assert (status.state, status.waiting_for) == (RunState.HALTED, "a session with takeover")
    assert status.last_error == "steps 1 to 3 were not finite"


def test_a_superseded_nonce_never_opens_a_session(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    engine.train_step(bare(0))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    first = engine.open_session(SessionRequest("a", "first"))
    second = engine.open_session(SessionRequest("a", "second"))
    rig.trainer.gate.set()
    assert reason(first) == "FENCED"
    epoch = second.result(WAIT).epoch
    assert reason(engine.open_session(SessionRequest("a", "first"))) == "FENCED", "a retry too"
    assert engine.status().epoch == epoch


def test_openings_at_once_get_an_epoch_each_and_the_same_nonce_the_same(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    engine.train_step(bare(0))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    futures = [
        engine.open_session(SessionRequest(name, nonce, takeover=True))
        for name, nonce in (("a", "1"), ("a", "1"), ("b", "2"), ("c", "3"), ("c", "3"), ("a", "1"))
    ]
    rig.trainer.gate.set()
    assert [reason(futures[i]) for i in (0, 1, 2, 5)] == ["FENCED"] * 4
    assert futures[3].result(WAIT).epoch == futures[4].result(WAIT).epoch == 3
    assert engine.open_session(SessionRequest("c", "3")).result(WAIT).epoch == 3


def test_an_opening_answers_with_its_own_epoch_whoever_came_since(rig: Rig) -> None:
    engine = rig.start()
    for turn in range(30):
        futures = [
            engine.open_session(SessionRequest(name, f"{name}{turn}", takeover=True)) for name in "abc"
        ]
        epochs = [future.result(WAIT).epoch for future in futures if future.exception(WAIT) is None]
        assert len(set(epochs)) == len(epochs), "nobody shares an epoch"
        assert max(epochs) == engine.status().epoch


def test_a_checkpoint_of_another_run_is_set_aside(rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path / "other")
    engine = other.start()
    for seed in range(5):
        engine.train_step(bare(seed)).result(WAIT)
    engine.save(SaveRequest("foreign")).result(WAIT)
    close(other)
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    close(rig)
    shutil.copytree(other.folder / "checkpoints" / "foreign", rig.folder / "checkpoints" / "foreign")
    engine = rig.start()
    assert [info.name for info in engine.checkpoints()] == ["step-000000000"]
    assert engine.status().step == 1


def test_a_request_id_of_a_save_or_a_restore_means_the_same_request(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    saved = engine.save(SaveRequest("one", "id-1")).result(WAIT)
    assert engine.save(SaveRequest("one", "id-1")).result(WAIT) == saved
    others = (SaveRequest("two", "id-1"), SaveRequest(None, "id-1"), SaveRequest("one", "id-1", {"a": "b"}))
    for other in others:
        assert reason(engine.save(other)) == "PAYLOAD_MISMATCH"
    engine.save(SaveRequest("two", "id-2")).result(WAIT)
    back = engine.restore(RestoreRequest("one", "id-3")).result(WAIT)
    assert engine.restore(RestoreRequest("one", "id-3")).result(WAIT) == back
    assert reason(engine.restore(RestoreRequest("two", "id-3"))) == "PAYLOAD_MISMATCH"


def test_a_request_that_a_restore_went_back_behind_is_not_said_to_be_in_the_history(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1, "r1")).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    engine.train_step(bare(2, "r2")).result(WAIT)
    engine.restore(RestoreRequest("one")).result(WAIT)
    assert engine.train_step(bare(1, "r1")).result(WAIT).replayed
    assert reason(engine.train_step(bare(2, "r2"))) == "WRONG_RUN"
    assert engine.train_step(bare(2, "r2-again")).result(WAIT).step == 2


def test_a_save_at_the_step_of_a_damaged_checkpoint_writes_it_again(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(1)).result(WAIT)
    engine.save(SaveRequest()).result(WAIT)
    state = rig.folder / "checkpoints" / "step-000000001" / "state.json"
    whole = state.read_text()
    close(rig)
    state.write_text("{}")
    engine = rig.start(checkpoints=LONG)
    engine.save(SaveRequest()).result(WAIT)
    assert state.read_text() == whole


def test_one_batch_too_large_for_the_disk_is_refused_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    monkeypatch.setattr(Reserve, "left", lambda _, waiting: 2**20 - waiting)
    monkeypatch.setattr(Journal, "log_bytes", lambda _: 2**20 - 2**15)
    large = StepRequest(Payload(Batch(np.full((64, 512), 300), 64, 512), Modes()))
    assert reason(engine.train_step(large)) == "HELD"
    assert engine.status().state is RunState.SERVING
    assert engine.train_step(bare(1)).result(WAIT).step == 2


@pytest.mark.parametrize("damage", ["index", "manifest", "event"])
def test_verify_finds_what_a_start_does_not_look_at(rig: Rig, damage: str) -> None:
    engine = rig.start()
    for seed in range(40):
        engine.train_step(bare(seed, f"request-{seed}")).result(WAIT)
    engine.save(SaveRequest("forty")).result(WAIT)
    close(rig)
    assert verify.verify(rig.folder).problems == []
    path = rig.folder / "journal.sqlite"
    if damage == "index":
        find = "SELECT rootpage FROM sqlite_master WHERE name = 'steps_by_request'"
        with contextlib.closing(sqlite3.connect(path)) as journal:
            page = journal.execute(find).fetchone()[0]
        data = bytearray(path.read_bytes())
        at = data.index(b"request-7", (page - 1) * 4096)
        data[at : at + 9] = b"request-X"
        path.write_bytes(data)
    elif damage == "manifest":
        manifest = rig.folder / "checkpoints" / "forty" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"forty"', '"fifty"'))
    else:
        change(rig.folder, "UPDATE events SET body = body || ' ' WHERE kind = 'instance'")
    problems = verify.verify(rig.folder).problems
    assert problems, damage
    if damage == "manifest":
        assert "checkpoint forty: manifest.json cannot be read" in problems[0]


def test_a_run_that_was_restored_survives_damage_to_what_it_was_restored_from(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for seed in range(22):
        engine.train_step(bare(seed)).result(WAIT)
        if seed in (9, 14, 19):
            engine.save(SaveRequest(f"at-{seed + 1}")).result(WAIT)
    engine.restore(RestoreRequest("at-10")).result(WAIT)
    for seed in range(3):
        last = engine.train_step(bare(50 + seed)).result(WAIT)
    wait_for(lambda: engine.checkpoints()[0].lineage == 2)
    state = rig.trainer.state
    close(rig)
    for name in ("at-10", "step-000000010-lineage-2"):
        whole = (rig.folder / "checkpoints" / name / "state.json").read_text()
        (rig.folder / "checkpoints" / name / "state.json").write_text("{}")
        engine = rig.start()
        assert (engine.status().digest, rig.trainer.state) == (last.digest, state), name
        close(rig)
        aside = rig.folder / "checkpoints" / f"{name}.aside"
        if aside.exists():  # only what a start looked at is
            aside.rename(rig.folder / "checkpoints" / name)
        (rig.folder / "checkpoints" / name / "state.json").write_text(whole)


def test_a_run_of_weights_from_elsewhere_never_begins_at_seeded_ones(rig: Rig) -> None:
    from maskwire_server.recovery import imported_run

    whole = rig.config()
    imported_run.begin(
        rig.folder, CounterTrainer, whole.model_dump(mode="json"), seed=whole.run.seed,
        canonical=whole.canonical(), versions={}, labels={}, texts={},
    )  # fmt: skip
    assert rig.start().checkpoints()[0].name == "imported"
    close(rig)
    state = rig.folder / "checkpoints" / "imported" / "state.json"
    text = state.read_text()
    state.write_text("{}")
    for _ in range(2):  # the second time it was set aside
        with pytest.raises(
            RunDirectoryError, match="the run began from imported weights in checkpoint 'imported'"
        ):
            rig.start()
        rig.engines.pop()
    assert any("imported" in problem for problem in verify.verify(rig.folder).problems)
    aside = rig.folder / "checkpoints" / "imported.aside"
    (aside / "state.json").write_text(text)
    aside.rename(rig.folder / "checkpoints" / "imported")
    assert rig.start().status().step == 0


def test_an_unnamed_save_keeps_its_labels_beside_an_automatic_one(rig: Rig) -> None:
    engine = rig.start(checkpoints={"every_steps": 1, "every_seconds": 1e6, "keep_last": 2})
    engine.train_step(bare(0)).result(WAIT)
    wait_for(lambda: engine.checkpoints()[0].step == 1 and not engine._saves.busy)
    saved = engine.save(SaveRequest(None, "id", {"why": "mine"})).result(WAIT)
    assert (saved.name, saved.labels) == ("step-000000001-2", {"why": "mine"})
    assert engine.save(SaveRequest(None, "id", {"why": "mine"})).result(WAIT) == saved
    for seed in range(1, 6):
        step = engine.train_step(bare(seed)).result(WAIT).step
        wait_for(lambda step=step: engine.checkpoints()[0].step == step and not engine._saves.busy)
    assert saved.name in [info.name for info in engine.checkpoints()], "retention leaves it alone"


def test_a_save_behind_another_does_not_keep_the_steps_waiting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(0)).result(WAIT)
    release = threading.Event()
    failpoints.install(lambda name: name == "checkpoint.begun" and release.wait(WAIT))
    first, second = engine.save(SaveRequest("first")), engine.save(SaveRequest("second"))
    assert [engine.train_step(bare(seed)).result(WAIT).step for seed in range(1, 4)] == [2, 3, 4]
    assert not first.done()
    release.set()
    assert first.result(WAIT).step == 1
    assert second.result(WAIT).step == 4, "it is of the state when its turn came"


def test_a_folder_that_says_it_is_another_checkpoint_is_set_aside(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    close(rig)
    (rig.folder / "checkpoints" / "one").rename(rig.folder / "checkpoints" / "two")
    assert any("is that of checkpoint 'one'" in problem for problem in verify.verify(rig.folder).problems)
    engine = rig.start()
    assert (rig.folder / "checkpoints" / "two.aside").is_dir()
    assert engine.status().step == 1


def test_what_is_nobodys_checkpoint_is_left_alone(rig: Rig) -> None:
    rig.start()
    close(rig)
    folder = rig.folder / "checkpoints"
    (folder / "my-notes").mkdir()
    (folder / "my-notes" / "important.txt").write_text("x")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "model.safetensors").write_text("x")
    rig.start()
    assert (folder / "my-notes" / "important.txt").exists()
    assert not (folder / "unfinished").exists()


def test_a_deletion_that_the_disk_refuses_is_said_and_ends_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    for name in ("one", "two", "three"):
        engine.train_step(bare(len(name))).result(WAIT)
        engine.save(SaveRequest(name)).result(WAIT)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refused)
    assert reason(engine.delete("one")) == "CHECKPOINT_FAILED"
    assert engine.train_step(bare(9)).result(WAIT).step == 4


def test_an_evaluation_that_nobody_waits_for_frees_the_device(rig: Rig) -> None:

    began = threading.Event()

    class Long(CounterTrainer):
        def eval_loss(self, batch: object, options: object, wanted: object = None) -> object:  # type: ignore[override]
            began.set()
            while wanted():  # type: ignore[operator]
                time.sleep(0.001)
            raise Unwanted("nobody")

    engine = rig.start(Long)
    request = EvalRequest(payload(0).batch, EvalOptions(draws=1, row_ids=(0, 1)))
    future = engine.eval_loss(request)
    assert began.wait(WAIT)
    future.cancel()
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    began.clear()
    future = engine.eval_loss(request)
    assert began.wait(WAIT)
    assert engine.drain(WAIT), "SIGTERM ends it too"
    assert reason(future) == "DRAINING"


def test_verify_looks_at_sessions_configurations_and_the_fallback(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    open_session(engine)
    for seed in range(6):
        engine.train_step(StepRequest(payload(seed), open_session(engine))).result(WAIT)
        if seed in (1, 3):
            engine.save(SaveRequest(f"at-{seed + 1}")).result(WAIT)
    close(rig)
    assert verify.verify(rig.folder).problems == []
    for statement, words in (
        ("UPDATE sessions SET client_name = 'x'", "epoch 1 does not match its hash"),
        (
            "UPDATE events SET kind = 'other' WHERE kind = 'configuration'",
            "the configuration of steps, is missing",
        ),
        ("DELETE FROM payloads WHERE step = 3", "after checkpoint at-2, was dropped"),
    ):
        copy = rig.folder.with_name("copy")
        shutil.copytree(rig.folder, copy)
        change(copy, statement)
        assert any(words in problem for problem in verify.verify(copy).problems), statement
        shutil.rmtree(copy)


def test_an_evaluation_on_the_device_is_refused_once_however_often_it_is_in_the_way(rig: Rig) -> None:
    began, release = threading.Event(), threading.Event()

    class Deaf(CounterTrainer):
        def eval_loss(self, *_: object) -> object:  # type: ignore[override]
            began.set()
            release.wait(WAIT)
            raise Unwanted("nobody")

    engine = rig.start(Deaf)
    engine.save(SaveRequest("zero")).result(WAIT)
    future = engine.eval_loss(EvalRequest(payload(0).batch, EvalOptions(draws=1, row_ids=(0, 1))))
    assert began.wait(WAIT)
    back = [engine.restore(RestoreRequest("zero", f"r{i}")) for i in range(2)]
    assert reason(future) == "RESTORING"
    assert reason(back[1]) == "RESTORING"
    drained = threading.Thread(target=engine.drain, args=(WAIT,))
    drained.start()  # it asks once more
    wait_for(lambda: engine.status().state is RunState.DRAINING)
    release.set()
    drained.join()
    assert not rig.fatal


def test_a_damaged_index_of_request_ids_is_rebuilt_when_the_disk_has_space(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = rig.start()
    engine.train_step(bare(1, "request-one")).result(WAIT)
    close(rig)
    path = rig.folder / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as journal:
        find = "SELECT rootpage FROM sqlite_master WHERE name = 'steps_by_request'"
        page = journal.execute(find).fetchone()[0]
    data = bytearray(path.read_bytes())
    at = data.index(b"request-one", (page - 1) * 4096)
    data[at : at + 7] = b"XXXXXXX"
    path.write_bytes(data)
    rebuild, tries = Journal.rebuild_request_index, []

    def full_at_first(self: Journal) -> None:
        tries.append(self._db.in_transaction)
        if len(tries) == 1:
            raise FullDisk
        rebuild(self)

    monkeypatch.setattr(Journal, "rebuild_request_index", full_at_first)
    again = rig.start()
    assert again.train_step(bare(1, "request-one")).result(WAIT).replayed
    assert tries == [True, True]
    assert "index of request ids was damaged" in caplog.text
