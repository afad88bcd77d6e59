"""A restore from segments in more than one format of the journal."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from mirrors import MirroredRig, lose_the_machine, restored, steps, train, upload_all
from rig import WAIT

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import database, mirror_segment_writer, outbox, restored_journal, schema
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import resume


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path, "mirrored")
    yield rig
    rig.close()


def migrate(monkeypatch: pytest.MonkeyPatch, *, table: bool) -> None:
    """The next version of the software: another format of the journal, with a new table or without."""
    statement = "CREATE TABLE further (key INTEGER PRIMARY KEY)"

    def to_4(db: sqlite3.Connection) -> None:
        """migrate format 3 to 4"""
        if table:
            db.execute(statement)
        db.execute("UPDATE run SET value = 4 WHERE key = 'format'")

    monkeypatch.setitem(database.MIGRATIONS, 3, to_4)
    for module in (schema, database, outbox, mirror_segment_writer, restored_journal):
        monkeypatch.setattr(module, "FORMAT", 4)
    monkeypatch.setattr(restored_journal, "TABLES", (*schema.TABLES, statement) if table else schema.TABLES)


@pytest.mark.parametrize("table", [True, False], ids=["a new table", "no new table"])
def test_a_run_is_restored_from_its_upload_after_a_migration(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch, table: bool
) -> None:
    engine = rig.start()
    train(engine, 3)
    engine.drain(WAIT)
    engine.close()
    with monkeypatch.context() as patch:
        migrate(patch, table=table)
        engine = rig.start()
        train(engine, 2, first=3)
        digest = engine.status().digest
        lose_the_machine(rig, engine)
        assert restored(rig, "run").endswith("no acknowledged step is lost")
        again = rig.start()
        assert (again.status().durable_step, again.status().digest) == (5, digest)
        again.close()
    with pytest.raises(RunDirectoryError, match="journal format is 4, but this version reads 3"):
        rig.restore("with the older version")


def test_until_the_upload_after_a_migration_is_complete_the_older_version_restores(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_PAGE", 4)
    engine = rig.start()
    train(engine, 3)
    engine.drain(WAIT)
    engine.close()
    with monkeypatch.context() as patch:
        migrate(patch, table=True)
        list(itertools.islice(upload_all(rig), 3))
        with pytest.raises(RunDirectoryError, match="journal format is 3, but this version reads 4"):
            rig.restore("with the newer version")
    words = restored(rig, "with the older version")
    assert words.endswith(
        "upload of the complete journal was not finished and is not used; no acknowledged step is lost"
    )
    assert steps(rig, "with the older version") == 3


def test_a_segment_that_was_uploaded_before_a_migration_is_recognised_after_it(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server died after the upload, before the journal knew; then tables got other columns."""
    journal = Journal(rig.folder / "run")
    journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
    writer = resume(journal, rig.store, "local")
    writer.compose(journal.outbox.page(0, 2**30))
    writer.send()
    journal._db.execute("ALTER TABLE lineages ADD COLUMN later TEXT")
    assert resume(journal, rig.store, "local").number == writer.number + 1
    journal.close()
