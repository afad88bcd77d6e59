"""The catalogue knows a run's checkpoints without reading its folder; deletions check the disk first."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import WAIT, Rig, bare, reason, wait_for

from maskwire_server import failpoints
from maskwire_server.checkpoints import store
from maskwire_server.engine import commits
from maskwire_server.engine.engine import Engine
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.schema import facts_hash
from maskwire_server.manifest import Manifest
from maskwire_server.requests import DownloadRequest, RestoreRequest, SaveRequest

LONG = {"every_seconds": 1e9, "keep_last": 2}


def train(engine: Engine, first: int, count: int) -> None:
    for seed in range(first, first + count):
        engine.train_step(bare(seed)).result(WAIT)


def stop(rig: Rig) -> None:
    rig.engines.pop().close()


def damage(folder: Path) -> None:
    file = folder / "state.json"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def recorded(run_dir: Path) -> dict[str, bytes]:
    journal = Journal(run_dir)
    try:
        return journal.checkpoints()
    finally:
        journal.close()


def on_disk(run_dir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run_dir.glob("checkpoints/*/manifest.json")}


def batches(run_dir: Path) -> list[int]:
    journal = Journal(run_dir)
    try:
        return [record.step for record, batch in journal.steps_after(1, 0) if batch is not None]
    finally:
        journal.close()


def test_a_save_reads_no_manifest_but_those_it_relies_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start(checkpoints={"every_seconds": 1e9, "keep_last": 20})
    for step in range(1, 13):
        train(engine, step, 1)
        engine.save(SaveRequest()).result(WAIT)
    read: list[str] = []
    read_manifest, iterdir = store.read_manifest, Path.iterdir

    def noted(folder: Path) -> Manifest | None:
        read.append(folder.name)
        return read_manifest(folder)

    def listed(path: Path) -> object:
        assert path != rig.folder / "checkpoints", "the folder of checkpoints was listed"
        return iterdir(path)

    monkeypatch.setattr(store, "read_manifest", noted)
    monkeypatch.setattr(Path, "iterdir", listed)
    train(engine, 13, 1)
    saved = engine.save(SaveRequest()).result(WAIT)
    newest = engine.status().newest_checkpoint
    assert newest is not None
    assert newest.name == saved.name
    assert set(read) == {saved.name, "step-000000012"}


def test_a_listing_reads_no_manifest_that_is_known(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("one")).result(WAIT)
    monkeypatch.setattr(store, "read_manifest", lambda folder: pytest.fail(f"{folder} was read"))
    assert [info.name for info in engine.checkpoints()] == ["one", "step-000000000"]


def test_the_journals_table_follows_saves_and_deletions(rig: Rig) -> None:
    engine = rig.start(checkpoints={"every_steps": 2, "every_seconds": 1e9, "keep_last": 2})
    for step in range(1, 7):
        train(engine, step, 1)
        if step % 2:
            engine.save(SaveRequest(f"named-{step}")).result(WAIT)
        wait_for(lambda: not engine._saves.busy)
    engine.delete("named-1").result(WAIT)
    stop(rig)
    assert recorded(rig.folder) == on_disk(rig.folder)
    assert recorded(rig.folder).keys() == {"named-3", "named-5", "step-000000004", "step-000000006"}


def drop_rows(journal: Journal) -> None:
    for name in journal.checkpoints():
        journal.remove_checkpoint(name)
    journal.put_checkpoint("gone", b"{}")


def damage_a_name(journal: Journal) -> None:
    journal._db.execute("UPDATE checkpoints SET name = CAST(X'FFFE' AS TEXT) WHERE name = 'one'")


def lose_a_row(journal: Journal) -> None:
    """As a damaged page reads."""
    journal._db.execute("UPDATE checkpoints SET name = NULL WHERE name = 'one'")


def back_to_format_2(journal: Journal) -> None:
    journal._db.execute("DROP TABLE checkpoints")
    journal._db.execute("DELETE FROM run WHERE key IN ('digest_version', 'num_tokens')")
    journal._db.execute("UPDATE run SET value = ? WHERE key = 'hash'", (facts_hash(journal._db),))
    journal._db.execute("UPDATE run SET value = 2 WHERE key = 'format'")


@pytest.mark.parametrize("change", [drop_rows, damage_a_name, lose_a_row, back_to_format_2])
def test_a_start_rebuilds_the_table_from_the_folders(rig: Rig, change: Callable[[Journal], None]) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("one")).result(WAIT)
    stop(rig)
    journal = Journal(rig.folder)
    journal.transaction(lambda: change(journal))
    journal.close()
    engine = rig.start(checkpoints=LONG)
    assert [info.name for info in engine.checkpoints()] == ["one", "step-000000000"]
    stop(rig)
    assert recorded(rig.folder) == on_disk(rig.folder)


def test_a_checkpoint_that_is_removed_by_hand_is_not_listed(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("one")).result(WAIT)
    shutil.rmtree(rig.folder / "checkpoints" / "one")
    assert reason(engine.restore(RestoreRequest("one"))) == "CHECKPOINT_NOT_FOUND"
    assert [info.name for info in engine.checkpoints()] == ["step-000000000"]


@pytest.mark.parametrize("how", [damage, shutil.rmtree], ids=["damaged", "removed"])
def test_no_batch_is_dropped_while_a_checkpoint_that_a_start_relies_on_is_damaged(
    rig: Rig, how: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    train(engine, 2, 2)
    how(rig.folder / "checkpoints" / "two")
    with caplog.at_level(logging.ERROR):
        engine.save(SaveRequest("four")).result(WAIT)
    assert "checkpoint two" in caplog.text
    assert "no old checkpoint or batch is deleted until the next save" in caplog.text
    digest, state = engine.status().digest, rig.trainer.state
    stop(rig)
    assert batches(rig.folder) == [1, 2, 3, 4]
    damage(rig.folder / "checkpoints" / "four")
    again = rig.start(checkpoints=LONG)
    assert (again.status().digest, rig.trainer.state) == (digest, state), "recovered from checkpoint 0"


def test_the_save_after_it_drops_batches_again(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    damage(rig.folder / "checkpoints" / "two")
    for step in (2, 4):
        train(engine, step, 2)
        engine.save(SaveRequest(f"at-{step + 2}")).result(WAIT)
    stop(rig)
    assert batches(rig.folder) == [5, 6]


def test_the_newest_checkpoint_is_read_again_too(rig: Rig, request: pytest.FixtureRequest) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    train(engine, 2, 2)

    def spoil(name: str) -> None:
        if name == "checkpoint.published":
            damage(rig.folder / "checkpoints" / "four")

    request.addfinalizer(lambda: failpoints.install(None))
    failpoints.install(spoil)
    engine.save(SaveRequest("four")).result(WAIT)
    newest = engine.status().newest_checkpoint
    assert newest is not None
    assert newest.name == "two"
    stop(rig)
    assert batches(rig.folder) == [1, 2, 3, 4]


def test_no_transaction_deletes_more_batches_than_the_bound(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "DROPPED_AT_ONCE", 4)
    deleted: list[int] = []
    transaction = Journal.transaction

    def counted(journal: Journal, write: Callable[[], object]) -> None:
        rows = "SELECT count(*) FROM payloads"
        kept = None if journal.is_new else journal._db.execute(rows).fetchone()[0]
        transaction(journal, write)
        if kept is not None:
            deleted.append(kept - journal._db.execute(rows).fetchone()[0])

    monkeypatch.setattr(Journal, "transaction", counted)
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 11)
    engine.save(SaveRequest("one")).result(WAIT)
    engine.save(SaveRequest("two")).result(WAIT)
    wait_for(lambda: sum(count for count in deleted if count > 0) == 11)
    stop(rig)
    assert max(deleted) <= 4
    assert batches(rig.folder) == []


def test_damaged_checkpoints_do_not_count_as_those_that_a_start_needs(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for step, name in enumerate(("one", "two", "three"), 1):
        train(engine, step, 1)
        engine.save(SaveRequest(name)).result(WAIT)
    damage(rig.folder / "checkpoints" / "three")
    engine._checkpoints.doubt("three")
    assert reason(engine.delete("two")) == "CHECKPOINT_NEEDED"
    assert reason(engine.delete("one")) == "CHECKPOINT_NEEDED"
    assert sorted(on_disk(rig.folder)) == ["one", "step-000000000", "three.aside", "two"]


def test_a_checkpoint_that_is_being_downloaded_is_not_deleted(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    for step, name in enumerate(("one", "two", "three"), 1):
        train(engine, step, 1)
        engine.save(SaveRequest(name)).result(WAIT)
    chunks = engine.download(DownloadRequest("one"))
    next(chunks)
    refused = engine.delete("one")
    assert reason(refused) == "CHECKPOINT_NEEDED"
    assert str(refused.exception()).endswith(
        "'one' cannot be deleted: it is being downloaded; wait, or save another checkpoint first"
    )
    assert len(list(chunks)) > 0


@pytest.mark.parametrize("failure", ["delete", "read"])
def test_what_retention_could_not_delete_goes_with_the_next_save(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    engine = rig.start(checkpoints={"every_steps": 1, "keep_last": 2})

    def fail(place: str, **_: object) -> None:
        if place == "checkpoint.collecting":
            raise PermissionError(1, "Operation not permitted")

    def unreadable(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        if failure == "delete":
            patch.setattr(failpoints, "_action", fail)
        else:
            patch.setattr(store, "describe", unreadable)
        for step in (1, 2):
            train(engine, step, 1)
            wait_for(lambda step=step: len(on_disk(rig.folder)) == step + 1 and not engine._saves.busy)
    assert sorted(on_disk(rig.folder)) == ["step-000000000", "step-000000001", "step-000000002"]
    words = {
        "delete": "retention could not delete checkpoint step-000000000 ([Errno 1] Operation not permitted)",
        "read": "retention could not delete checkpoints ([Errno 24] Too many open files)",
    }
    assert words[failure] in caplog.text
    train(engine, 3, 1)
    wait_for(lambda: sorted(on_disk(rig.folder)) == ["step-000000002", "step-000000003"])
