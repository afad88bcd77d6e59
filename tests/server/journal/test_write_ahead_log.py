"""How much of the write-ahead log is in use, beside what SQLite itself says."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskwire.v1.values import Losses, Outcome
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.journal.run_directory import JOURNAL_FILE
from maskwire_server.journal.write_ahead_log import WriteAheadLog

PAGE = 4096 + 24


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "run")
    opened.create({"run_id": "r", "seed": 1}, b"d" * 32)
    yield opened
    opened.close()


def frames(folder: Path, room: Path) -> int:
    """The frames of a copy's log, counted by SQLite."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(folder / f"{JOURNAL_FILE}{suffix}", room)
    database = sqlite3.connect(room / JOURNAL_FILE)
    database.execute("SELECT count(*) FROM steps").fetchall()
    busy, count, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    database.close()
    assert not busy
    return int(count)


def add(journal: Journal, step: int, size: int) -> None:
    record = StepRecord(
        1, step, f"r{step}", 1, bytes(32), Outcome.APPLIED, Losses(1.5, 1.25), 0.5, bytes([step]) * 32
    )
    journal.transaction(lambda: journal.add_step(record, bytes(size)))


def test_the_bytes_in_use_are_those_of_sqlites_frames(journal: Journal, tmp_path: Path) -> None:
    draw = random.Random(3)
    for step in range(1, 60):
        add(journal, step, draw.choice([10, 5_000, 70_000, 300_000]))
        assert journal.log_bytes() == 32 + PAGE * frames(tmp_path / "run", tmp_path / "copy")
        if step % 13 == 0:
            journal.merge_log(truncate=step == 26)
            assert journal.log_bytes() == 0
            journal.transaction(lambda: None)
            assert journal.log_bytes() == 0, "nothing was written"
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    with_log = Journal(again)
    assert with_log.log_bytes() == journal.log_bytes() > 0
    assert len(list(with_log.steps_after(1, 0))) == 59
    with_log.close()


def test_the_file_is_written_again_from_its_start_after_a_merge(journal: Journal) -> None:
    for step in range(1, 40):
        add(journal, step, 20_000)
    size = journal.log_file_bytes()
    assert size == journal.log_bytes()
    journal.merge_log()
    for step in range(40, 75):
        add(journal, step, 20_000)
    assert journal.log_file_bytes() == size
    assert 0 < journal.log_bytes() < size
    journal.merge_log(truncate=True)
    assert journal.log_file_bytes() == journal.log_bytes() == 0
    assert len(list(journal.steps_after(1, 0))) == 74


def test_a_log_that_sqlite_has_not_created_yet_has_no_bytes(tmp_path: Path) -> None:
    log = WriteAheadLog(tmp_path / "journal.sqlite-wal")
    assert log.size() == log.used_bytes() == 0
