"""The journal: what is durable, what is found out about damage, and who may open it."""

from __future__ import annotations

import errno
import itertools
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from maskwire.v1.digest import DigestVersion
from maskwire.v1.values import InexactReplay, Losses, Outcome
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import database, fsync, inexact_replays, reserve
from maskwire_server.journal.ancestry import Segment, ancestry
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, SessionRecord, StepRecord, Stretch
from maskwire_server.journal.run_directory import JOURNAL_FILE

Open = Callable[..., Journal]


@pytest.fixture
def open_journal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Journal] = []

    def open_one(name: str = "run") -> Journal:
        journal = Journal(tmp_path / name)
        opened.append(journal)
        if journal.is_new:
            journal.create({"run_id": "r", "seed": 1}, b"d" * 32)
        return journal

    yield open_one
    for journal in opened:
        journal.close()


def record(step: int, **changes: object) -> StepRecord:
    fields: dict[str, object] = {
        "lineage": 1, "step": step, "request_id": f"r{step}", "configuration": 1,
        "payload_hash": bytes([step]) * 32, "outcome": Outcome.APPLIED, "losses": Losses(1.5, 1.25, None),
        "gradient_norm": 0.5, "digest": bytes([step + 1]) * 32,
    }  # fmt: skip
    return StepRecord(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "losses",
    [
        Losses(0.1, 0.1, None),
        Losses(0.3, None, 0.3),
        Losses(0.4, 0.0, 0.4),
        Losses(-0.0, -0.0, None),
        Losses(math.inf, math.inf, None),
    ],
)
def test_a_record_comes_back_as_it_went_and_absent_stays_absent(open_journal: Open, losses: Losses) -> None:
    journal = open_journal()
    for request_id, norm in ((None, None), ("r", 0.0)):
        step = 1 if request_id is None else 2
        kept = record(step, losses=losses, request_id=request_id, gradient_norm=norm)
        journal.transaction(lambda kept=kept: journal.add_step(kept, b"payload"))
        assert journal.step(1, step) == kept
    assert journal.step_of_request("r") == kept
    assert journal.step_of_request("x") is None
    assert journal.last_step(1) == kept
    assert [payload for _, payload in journal.steps_after(1, 0)] == [b"payload"] * 2
    assert not journal.drop_payloads([Stretch(1, -1, 1)], 2, 99), "there is no more"
    assert [(r.step, payload) for r, payload in journal.steps_after(1, 0)] == [(1, None), (2, b"payload")]


def test_it_is_all_there_when_it_is_opened_again(open_journal: Open) -> None:
    journal = open_journal()
    journal.transaction(lambda: journal.add_step(record(1), b"p"))
    journal.transaction(lambda: journal.add_session(SessionRecord(1, "me", "nonce", True, 1, 1, False)))
    event = []
    journal.transaction(lambda: event.append(journal.add_event("configuration", {"a": 1})))
    journal.transaction(lambda: journal.add_lineage(Lineage(2, 1, 1, b"x" * 32, "q", "c")))
    journal.close()
    again = open_journal()
    assert not again.is_new
    assert (again.fact("run_id"), again.fact("seed")) == ("r", 1)
    assert again.step(1, 1) == record(1)
    assert again.last_session() == again.session_of_nonce("nonce") == again.last_takeover()
    assert again.event(event[0]) == {"a": 1}
    assert again.lineages()[2] == Lineage(2, 1, 1, b"x" * 32, "q", "c")
    again.close_session(1)
    last = again.last_session()
    assert last is not None
    assert last.closed


def test_a_transaction_that_raises_leaves_no_trace(open_journal: Open) -> None:
    journal = open_journal()

    def write() -> None:
        journal.add_step(record(1), b"p")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        journal.transaction(write)
    assert journal.step(1, 1) is None
    journal.transaction(lambda: journal.add_step(record(1), b"p"))


def test_the_same_step_cannot_be_recorded_twice_and_a_request_id_finds_its_newest(open_journal: Open) -> None:
    journal = open_journal()
    journal.transaction(lambda: journal.add_step(record(1), b"p"))
    with pytest.raises(sqlite3.IntegrityError):
        journal.transaction(lambda: journal.add_step(record(1, request_id="new"), b"p"))
    again = record(2, request_id="r1")
    journal.transaction(lambda: journal.add_step(again, b"p"))
    assert journal.step_of_request("r1") == again


@pytest.mark.parametrize(("most", "most_bytes"), [(2, 99), (99, 2)])
def test_one_transaction_deletes_a_bounded_number_of_batches_and_bytes(
    open_journal: Open, most: int, most_bytes: int
) -> None:
    journal = open_journal()
    for step in range(1, 8):
        journal.transaction(partial(journal.add_step, record(step), b"p"))
    gone = [Stretch(1, -1, 3), Stretch(1, 4, 6)]

    def kept() -> list[int]:
        return [r.step for r, payload in journal.steps_after(1, 0) if payload is not None]

    left, more = [kept()], True
    while more:
        found: list[bool] = []

        def two_saves_in_a_row(found: list[bool] = found) -> None:
            found.extend(journal.drop_payloads(gone, most, most_bytes) for _ in range(2))

        journal.transaction(two_saves_in_a_row)
        left.append(kept())
        more = found[-1]
    assert [len(before) - len(after) for before, after in itertools.pairwise(left)] == [2, 2, 1]
    assert kept() == [4, 7]


def test_a_deletion_does_not_write_as_much_as_it_deletes(open_journal: Open, tmp_path: Path) -> None:
    """As builds of SQLite do that overwrite what is deleted. The next steps would wait for it."""
    journal = open_journal()
    for step in range(1, 17):
        journal.transaction(partial(journal.add_step, record(step), bytes(2**16)))
    journal.merge_log(truncate=True)
    journal.transaction(lambda: journal.drop_payloads([Stretch(1, -1, 16)], 16, 2**30))
    assert [payload for _, payload in journal.steps_after(1, 0)] == [None] * 16
    log = tmp_path / "run" / f"{JOURNAL_FILE}-wal"
    assert 0 < log.stat().st_size < 2**18


@pytest.mark.parametrize("column", ["payload_hash", "numbers", "digest"])
def test_a_flipped_bit_in_a_record_is_found(open_journal: Open, tmp_path: Path, column: str) -> None:
    journal = open_journal()
    journal.transaction(lambda: journal.add_step(record(1), b"p"))
    journal.close()
    with sqlite3.connect(tmp_path / "run" / JOURNAL_FILE) as database:
        value = bytearray(database.execute(f"SELECT {column} FROM steps").fetchone()[0])
        value[-1] ^= 1
        database.execute(f"UPDATE steps SET {column} = ?", (bytes(value),))
    database.close()
    with pytest.raises(RunDirectoryError, match=r"step 1 .* does not match its hash"):
        open_journal().step(1, 1)


def test_a_second_server_on_the_directory_is_refused_by_process(open_journal: Open, tmp_path: Path) -> None:
    journal = open_journal()
    with pytest.raises(RunDirectoryError, match=r"another server \(process \d+\)"):
        Journal(tmp_path / "run")
    journal.close()
    open_journal()


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunDirectoryError, match="must be empty for a new run, but contains thesis"):
        Journal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checkpoints_without_a_journal_are_a_lost_journal(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="the journal was lost"):
        Journal(tmp_path)


def test_what_is_no_journal_is_not_taken_for_one(open_journal: Open, tmp_path: Path) -> None:
    folder = tmp_path / "junk"
    folder.mkdir()
    (folder / JOURNAL_FILE).write_bytes(b"junk" * 2000)
    with pytest.raises(RunDirectoryError, match="the journal is not readable"):
        Journal(folder)
    with pytest.raises(RunDirectoryError, match="the journal is not readable"):
        Journal(folder)  # and the lock is free again
    journal = open_journal()
    journal.transaction(lambda: journal._db.execute("UPDATE run SET value = 99 WHERE key = 'format'"))
    journal.close()
    with pytest.raises(RunDirectoryError, match="format is 99, but this version reads formats up to 3"):
        Journal(tmp_path / "run")


def test_a_journal_of_the_first_format_becomes_one_of_today(open_journal: Open, tmp_path: Path) -> None:
    journal = open_journal()
    session = SessionRecord(1, "me", "n", True, 1, 0, False)
    journal.transaction(lambda: (journal.add_session(session), journal.add_event("kind", {"a": 1})))
    lineages = journal.lineages()
    for statement in (  # as it was
        "ALTER TABLE lineages DROP COLUMN row_hash", "ALTER TABLE sessions DROP COLUMN row_hash",
        "UPDATE events SET body = substr(body, 65)", "DROP TABLE checkpoints",
        "DELETE FROM run WHERE key = 'hash'",
        "UPDATE run SET value = 1 WHERE key = 'format'",
    ):  # fmt: skip
        journal._db.execute(statement)
    journal.close()
    again = Journal(tmp_path / "run")
    assert again.fact("format") == 3
    assert (again.lineages(), again.last_session()) == (lineages, session)
    assert again.last_event("kind") == (1, {"a": 1})
    again.close()


def as_format_2(journal: Journal) -> None:
    """A journal as version 0.1 left it."""
    journal._db.execute("DROP TABLE checkpoints")
    journal._db.execute("UPDATE run SET value = 2 WHERE key = 'format'")
    journal.close()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_format_2_keeps_version_1_of_the_digest_if_it_has_steps(
    open_journal: Open, tmp_path: Path, steps: int
) -> None:
    journal = open_journal()
    for step in range(1, steps + 1):
        journal.transaction(partial(journal.add_step, record(step), b"payload"))
    as_format_2(journal)
    for _ in range(2):
        again = Journal(tmp_path / "run")
        assert again.fact("format") == 3
        assert again.digest_version() == (DigestVersion(1) if steps else None)
        again.close()


def test_a_migration_does_not_hide_that_the_facts_of_the_run_were_damaged(
    open_journal: Open, tmp_path: Path
) -> None:
    journal = open_journal()
    journal.transaction(partial(journal.add_step, record(1), b"payload"))
    journal._db.execute("UPDATE run SET value = 2 WHERE key = 'seed'")
    as_format_2(journal)
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="the run's identity does not match its hash"):
            Journal(tmp_path / "run")


def test_the_version_of_the_digest_is_sealed_with_the_facts_of_the_run(
    open_journal: Open, tmp_path: Path
) -> None:
    journal = open_journal()
    assert journal.digest_version() is None
    version = DigestVersion(2, 257)
    journal.transaction(partial(journal.fix_digest_version, version))
    journal.close()
    again = Journal(tmp_path / "run")
    assert again.digest_version() == version
    again._db.execute("DELETE FROM run WHERE key = 'digest_version'")
    again.close()
    with pytest.raises(RunDirectoryError, match="the run's identity does not match its hash"):
        Journal(tmp_path / "run")


def test_an_index_that_lost_a_request_is_rebuilt(open_journal: Open, tmp_path: Path) -> None:
    journal = open_journal()
    for step in range(1, 30):
        journal.transaction(partial(journal.add_step, record(step), b"payload"))
    find = "SELECT rootpage FROM sqlite_master WHERE name = 'steps_by_request'"
    page = journal._db.execute(find).fetchone()[0]
    journal.close()
    path = tmp_path / "run" / JOURNAL_FILE
    data = bytearray(path.read_bytes())
    name = str(record(7).request_id).encode()
    at = data.index(name, (page - 1) * 4096)
    data[at : at + len(name)] = b"X" * len(name)
    path.write_bytes(data)
    again = Journal(tmp_path / "run")
    assert again.step_of_request(name.decode()) is None
    assert again.missing_requests(1) >= 1
    again.transaction(again.rebuild_request_index)
    found = again.step_of_request(name.decode())
    assert found is not None
    assert found.step == 7
    assert again.missing_requests(1) == 0
    again.close()


def test_every_folder_that_is_made_for_a_run_is_flushed_into_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(fsync, "flush_folder", flushed.append)
    Journal(tmp_path / "new" / "runs" / "one").close()
    assert set(flushed) >= {tmp_path, tmp_path / "new", tmp_path / "new" / "runs"}


def test_a_place_that_cannot_hold_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match=r"file\S*: cannot be used as a run directory"):
            Journal(place)


def test_inexact_replays_of_both_formats_are_read_and_merged(open_journal: Open) -> None:
    journal = open_journal()
    steps = {"steps": [4, 3], "replays": [vars(InexactReplay(1, 5, 6, False))]}
    journal.transaction(lambda: journal.add_event(inexact_replays.EVENT, {"steps": [9, 8]}))  # version 0.1
    journal.transaction(lambda: journal.add_event(inexact_replays.EVENT, {"steps": []}))
    journal.transaction(lambda: journal.add_event(inexact_replays.EVENT, steps))
    found = inexact_replays.recorded(journal)
    assert [(each.lineage, each.first_step, each.last_step) for each in found] == [(1, 5, 6), (1, 8, 9)]


def test_a_journal_that_another_program_has_open_is_named(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_journal().close()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with closing(sqlite3.connect(tmp_path / "run" / JOURNAL_FILE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            RunDirectoryError, match=r"journal.sqlite: another process uses it; stop that one"
        ):
            Journal(tmp_path / "run")
    Journal(tmp_path / "run").close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_lock_needs_no_room_on_the_disk_but_a_disk_that_works(
    open_journal: Open, tmp_path: Path, number: int
) -> None:
    open_journal().close()
    with mock.patch("os.pwrite", side_effect=OSError(number, os.strerror(number))):
        if number == errno.ENOSPC:
            journal = Journal(tmp_path / "run")
            with pytest.raises(RunDirectoryError, match=r"another server \(process unknown\) uses this run"):
                Journal(tmp_path / "run")
            journal.close()
        else:
            with pytest.raises(RunDirectoryError, match="cannot be used as a run directory"):
                Journal(tmp_path / "run")
    Journal(tmp_path / "run").close()  # and the lock is free


def test_a_merge_of_the_log_that_fails_for_another_reason_than_space_is_an_error(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal()
    damaged = sqlite3.DatabaseError("database disk image is malformed")
    monkeypatch.setattr(Journal, "merge_log", mock.Mock(side_effect=damaged))
    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        reserve.merge_log(journal)


@pytest.mark.parametrize("room", [False, True])
def test_an_exceeded_quota_counts_as_a_full_disk(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """SQLite reports it as an I/O error of a write."""
    journal = open_journal()
    monkeypatch.setattr(database, "can_write", lambda *_: room)
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE

    def fail() -> None:
        raise error

    with pytest.raises(sqlite3.OperationalError) as raised:
        journal.transaction(fail)
    assert database.is_full(raised.value) is not room
    whole = journal._db
    journal._db = mock.Mock(wraps=whole)
    journal._db.execute.side_effect = lambda sql: fail() if "wal_checkpoint" in sql else whole.execute(sql)
    if room:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            reserve.merge_log(journal)
    else:
        assert not reserve.merge_log(journal)


@pytest.mark.parametrize("parent", [2, 3, 9])
def test_a_lineage_that_does_not_descend_from_an_earlier_one_is_damage(parent: int) -> None:
    lineages = {number: Lineage(number, 1, number, b"", None, None) for number in (2, 3)}
    lineages |= {1: Lineage(1, None, 0, b"", None, None), 2: Lineage(2, parent, 5, b"", None, None)}
    with pytest.raises(
        RunDirectoryError, match=f"lineage 2 must descend from an earlier lineage, got {parent}"
    ):
        ancestry(lineages, 2)
    assert ancestry(lineages, 3) == [Segment(1, 3), Segment(3, None)]
