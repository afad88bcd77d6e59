"""The records of a run in its mirror: what is noted, what a segment carries, who may write the next one."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from mirrors import MirroredRig, down, tables
from rig import WAIT, bare, open_session, wait_for

from maskwire_server.engine.engine import Engine
from maskwire_server.errors import FencedError, Refused, RunDirectoryError, StoreError
from maskwire_server.journal import outbox, schema
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import NOTHING, SegmentWriter, resume
from maskwire_server.journal.mirror_segments import Change, Segment, segment_name
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.outbox import MirrorState, apply
from maskwire_server.journal.records import Stretch
from maskwire_server.requests import RestoreRequest, SaveRequest


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


def deleted(engine: Engine, name: str) -> bool:
    """Delete a checkpoint; False while it is being uploaded."""
    try:
        engine.delete(name).result(WAIT)
    except Refused as refusal:
        assert "it is being copied to the mirror" in refusal.message
        return False
    return True


def a_long_life(rig: MirroredRig) -> None:
    """A run with everything that a journal can hold."""
    engine = rig.start(checkpoints={"every_steps": 3, "keep_last": 2})
    for step in range(4):
        engine.train_step(bare(step, f"first-{step}")).result(WAIT)
    session = open_session(engine, "job", "nonce", tokenizer="bytes", data={"files": "3"})
    engine.close_session(session).result(WAIT)
    engine.save(SaveRequest("kept", "id-of-the-save")).result(WAIT)
    for step in range(4, 8):
        engine.train_step(bare(step)).result(WAIT)
    engine.restore(RestoreRequest("kept", "id-of-the-restore")).result(WAIT)
    for step in range(8, 14):
        engine.train_step(bare(step, f"second-{step}")).result(WAIT)
    engine.save(SaveRequest("gone")).result(WAIT)
    engine.save(SaveRequest("newer")).result(WAIT)
    engine.train_step(bare(20)).result(WAIT)
    engine.save(SaveRequest("newest")).result(WAIT)
    wait_for(lambda: deleted(engine, "gone"))
    engine.drain(WAIT)
    engine.close()


def test_a_restored_journal_equals_the_original_table_by_table(rig: MirroredRig, tmp_path: Path) -> None:
    a_long_life(rig)
    assert rig.restore("other")
    original, restored = tables(tmp_path / "run"), tables(tmp_path / "other")
    assert {name for name, rows in original.items() if rows} >= {
        "run", "events", "lineages", "sessions", "steps", "checkpoints", "payloads",
    }  # fmt: skip
    batches = original.pop("payloads"), restored.pop("payloads")
    assert set(batches[0]) <= set(batches[1]), "the mirror keeps what its own checkpoints need"
    assert restored == original


def test_every_change_of_every_table_is_noted_and_can_be_made_again(tmp_path: Path) -> None:
    """Whatever statement makes it: the triggers are made from the tables that there are."""
    with closing(sqlite3.connect(":memory:")) as db, closing(sqlite3.connect(":memory:")) as copy:
        for statement in schema.TABLES:
            db.execute(statement)
            copy.execute(statement)
        noted = outbox.Outbox(db)
        noted.create()
        assert noted.is_current
        for table in {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}:
            if table in ("outbox", "mirror", "sqlite_sequence", outbox.BATCHES):
                continue
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()]
            marks = ",".join("?" * len(columns))
            rows = ([5, b"\0\xff", *"cdefghijkl"], [6, "text", *range(10)], [7, 0.1 + 0.2, *range(20, 30)])
            for row in rows:
                db.execute(f"INSERT INTO {table} VALUES ({marks})", row[: len(columns)])
            db.execute(f"UPDATE {table} SET {columns[-1]} = ? WHERE {columns[0]} = 6", (b"changed",))
            db.execute(f"DELETE FROM {table} WHERE {columns[0]} = 7")
            if table not in ("lineages", "sessions"):  # columns that are unique beside the key
                db.execute(f"REPLACE INTO {table} VALUES ({marks})", [5, *range(40, 60)][: len(columns)])
        noted.mark()
        noted.measure()
        page = noted.page(0, 2**30)
        segment = Segment("r", 1, "", "i", 0.5, "local", schema.FORMAT, page.first, page.last, page.changes)
        for change in Segment.decode(segment.encode()).changes:
            apply(copy, change)
        for (table,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            both = [
                sorted(each.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for each in (db, copy)
            ]
            assert both[0] == both[1], table


def test_a_new_table_or_column_makes_the_triggers_stale(tmp_path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        for statement in schema.TABLES:
            db.execute(statement)
        noted = outbox.Outbox(db)
        noted.create()
        db.execute("ALTER TABLE events ADD COLUMN later TEXT")
        assert not noted.is_current
        noted.create()
        db.execute("CREATE TABLE later (key INTEGER PRIMARY KEY)")
        assert not noted.is_current


def test_what_was_rolled_back_is_not_noted(tmp_path: Path) -> None:
    journal = a_journal(tmp_path)
    before = journal.outbox.position

    def fail() -> None:
        journal.add_event("lost", {})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        journal.transaction(fail)
    assert not journal.outbox.page(before, 2**30).changes
    journal.transaction(partial(journal.add_event, "kept", {}))
    (change,) = journal.outbox.page(before, 2**30).changes
    assert change.values[2] == "kept"
    assert journal.outbox.position == journal.outbox.page(before, 2**30).last
    journal.close()


def a_journal(folder: Path) -> Journal:
    journal = Journal(folder / "run")
    journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
    journal.outbox.fill(MirrorState("file:///nowhere"), journal.transaction)
    return journal


def test_segments_end_where_transactions_end(tmp_path: Path) -> None:
    journal = a_journal(tmp_path)
    after = journal.outbox.position

    def two_events() -> None:
        journal.add_event("one", {"text": "x" * 200})
        journal.add_event("two", {"text": "x" * 200})

    for _ in range(3):
        journal.transaction(two_events)
    page = journal.outbox.page(after, 100)
    assert [change.values[2] for change in page.changes] == ["one", "two"]
    assert page.more
    rest = journal.outbox.page(page.last, 2**20)
    assert len(rest.changes) == 4
    assert not rest.more
    journal.close()


def test_batches_stay_until_they_are_in_the_mirror(rig: MirroredRig, tmp_path: Path) -> None:
    with mock.patch.object(ObjectStore, "probe"):
        engine = rig.start(segment_seconds=60.0)
    for step in range(3):
        engine.train_step(bare(step)).result(WAIT)
    engine.close()
    journal = Journal(tmp_path / "run")
    drop = partial(journal.drop_payloads, [Stretch(1, -1)], 100, 2**20)
    journal.transaction(drop)
    assert [batch is not None for _, batch in journal.steps_after(1, 0)] == [True, True, True]
    page = journal.outbox.page(0, 2**30)
    assert [step for step, _ in page.batches[1]] == [1, 2, 3]
    state = journal.outbox.state()
    assert state is not None
    journal.transaction(partial(journal.outbox.uploaded, page.last, state))
    journal.transaction(drop)
    assert [batch is not None for _, batch in journal.steps_after(1, 0)] == [False, False, False]
    journal.close()


def test_a_segment_that_was_changed_is_refused() -> None:
    change = Change("events", "put", (1, 2.5, "kind", b"\0body", None))
    data = Segment("r", 7, "ab", "i", 1.25, "local", 3, 1, 2, (change,), (), ("checkpoints/x",)).encode()
    assert Segment.decode(data).changes == (change,)
    for place in (0, 70, len(data) - 3):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(ValueError, match="does not match its hash"):
            Segment.decode(changed)


def test_an_older_run_is_uploaded_whole_in_parts(
    rig: MirroredRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_PAGE", 4)
    journal = Journal(tmp_path / "run")
    journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
    for number in range(11):
        journal.transaction(partial(journal.add_event, "old", {"number": number}))
    writer = resume(journal, rig.store, "local")
    after, segments = 0, 0
    while (page := journal.outbox.page(after, 500)).last:
        writer.compose(page)
        writer.send()
        after, segments = page.last, segments + 1
        if page.more:
            with pytest.raises(RunDirectoryError, match="no complete copy"):
                rig.restore("early")
            break
    assert segments == 1
    journal.close()


class Writers:
    """Two writers at one address, each after the first segment."""

    def __init__(self, rig: MirroredRig) -> None:
        self.store = rig.store
        self.one = SegmentWriter(self.store, "run-1", "local", "one", 0, "")
        self.one.compose(NOTHING)
        self.one.send()
        self.two = SegmentWriter(self.store, "run-1", "local", "two", 1, self.one.hash)


def test_of_two_writers_one_is_fenced_and_its_number_stays_the_others(rig: MirroredRig) -> None:
    both = Writers(rig)
    for writer in (both.two, both.one):
        writer.compose(NOTHING)
    both.two.send()
    with pytest.raises(FencedError, match="instance two"):
        both.one.send()
    data = both.store.get(segment_name(2))
    assert data is not None
    assert Segment.decode(data).instance == "two"


def test_a_writer_whose_answer_was_lost_recognises_its_own_bytes(rig: MirroredRig) -> None:
    one = Writers(rig).one
    one.compose(NOTHING)
    create = ObjectStore.create

    def lose_the_answer(store: ObjectStore, name: str, data: bytes) -> None:
        create(store, name, data)
        raise StoreError("the connection was reset")

    with mock.patch.object(ObjectStore, "create", lose_the_answer), pytest.raises(StoreError):
        one.send()
    one.send()
    assert one.number == 2
    one.compose(NOTHING)
    one.send()
    assert one.number == 3


def test_a_server_that_died_after_an_upload_goes_on_behind_its_own_segment(
    rig: MirroredRig, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "run")
    journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
    first = resume(journal, rig.store, "local")
    journal.transaction(partial(journal.add_event, "uploaded", {}))
    first.compose(journal.outbox.page(0, 2**30))
    first.send()  # and dies before the journal knows
    journal.transaction(partial(journal.add_event, "not uploaded", {}))
    second = resume(journal, rig.store, "local")
    assert second.number == first.number + 1
    left = journal.outbox.page(0, 2**30).changes
    assert [change.values[2] for change in left] == ["not uploaded"]
    journal.close()


def test_a_directory_that_was_left_behind_is_fenced_at_its_start(rig: MirroredRig, tmp_path: Path) -> None:
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    engine.drain(WAIT)
    engine.close()
    assert rig.restore("other")
    with pytest.raises(FencedError, match="has taken the run over"):
        rig.start().wait_serving(WAIT)


def test_another_run_is_not_mirrored_over_this_one(rig: MirroredRig) -> None:
    rig.start().close()
    with pytest.raises(RunDirectoryError, match=r"holds run .* an address of its own"):
        rig.start("another run")


def test_a_missing_segment_and_a_damaged_one_stop_a_restore(rig: MirroredRig, tmp_path: Path) -> None:
    engine = rig.start()
    for step in range(3):
        engine.train_step(bare(step)).result(WAIT)
        wait_for(lambda step=step: engine.status().mirror.step == step + 1)  # type: ignore[misc,union-attr]
    engine.close()
    segments = sorted((tmp_path / "mirror" / "segments").iterdir())
    whole = segments[1].read_bytes()
    segments[1].write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(RunDirectoryError, match="does not match its hash"):
        rig.restore("other")
    segments[1].unlink()
    with pytest.raises(RunDirectoryError, match="000000000002: the segment is missing"):
        rig.restore("other")
    assert not (tmp_path / "other" / "journal.sqlite").exists()


def test_a_restore_names_the_segment_that_has_an_invalid_row(rig: MirroredRig, tmp_path: Path) -> None:
    engine = rig.start()
    engine.train_step(bare(0)).result(WAIT)
    wait_for(lambda: engine.status().mirror.step == 1)  # type: ignore[union-attr]
    engine.close()
    newest = max((tmp_path / "mirror" / "segments").iterdir())
    segment = Segment.decode(newest.read_bytes())
    row = next(change for change in segment.changes if change.table == "steps")
    changed = Change(row.table, row.kind, (*row.values[:3], None, *row.values[4:]))
    newest.write_bytes(dataclasses.replace(segment, changes=(changed,)).encode())
    with pytest.raises(RunDirectoryError, match=rf"{newest.name}: NOT NULL constraint failed: steps\."):
        rig.restore("other")


def test_a_restore_reads_a_faster_writer_first(rig: MirroredRig, tmp_path: Path) -> None:
    """The old server writes one more segment between the restore's reading and its claim."""
    journal = Journal(tmp_path / "run")
    journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
    old = resume(journal, rig.store, "local")
    old.compose(journal.outbox.page(0, 2**30))
    old.send()
    journal.transaction(partial(journal.add_event, "late", {}))
    after, create = journal.outbox.page(0, 2**30), ObjectStore.create
    left = [after]

    def be_faster(store: ObjectStore, name: str, data: bytes) -> None:
        if left:
            old.compose(journal.outbox.page(left.pop().last - 2, 2**30))
            old.send()
        create(store, name, data)

    with mock.patch.object(ObjectStore, "create", be_faster):
        assert rig.restore("other")
    assert "late" in str(tables(tmp_path / "other")["events"])
    old.compose(NOTHING)
    with pytest.raises(FencedError):
        old.send()
    journal.close()


def test_a_start_waits_for_the_store(rig: MirroredRig) -> None:
    with down():
        engine = rig.start(wait=False)
        wait_for(lambda: "the store is down" in engine.status().waiting_for)
    engine.wait_serving(WAIT)
