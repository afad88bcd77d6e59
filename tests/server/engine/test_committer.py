"""What the committer does while the disk has no room, turn by turn."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from maskwire.v1.values import RunState
from maskwire_server.config import ServeConfig
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.journal_queries import JournalQuery
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.journal.reserve import Reserve


class FakeJournal:
    full = False

    def log_bytes(self) -> int:
        return 0

    def log_file_bytes(self) -> int:
        return 0

    def transaction(self, write: Callable[[], object]) -> None:
        if self.full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        write()


class Noted:
    """A commit that notes what is done with it."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def write(self, journal: Any) -> None:
        self.done.append("written")

    def committed(self) -> None:
        self.done.append("answered")


def test_what_was_computed_is_committed_while_the_reserve_holds_new_steps_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, room = [0.0], [False]
    done: list[str] = []
    fake: Any = FakeJournal()
    run, disk = Run(ServeConfig(), lambda: now[0]), Reserve(tmp_path, 0)
    run.conditions.set(RunState.RECOVERING, False)
    monkeypatch.setattr(disk, "left", lambda _: 0 if room[0] else -1)
    committer = Committer(run, fake, disk, lambda: now[0], pytest.fail)
    monkeypatch.setattr(committer, "_timeout", lambda: 0.0)
    committer.append(Noted(done))
    with run.mutex:
        committer.hold()
    committer._cycle()
    assert done == ["written", "answered"]
    assert run.conditions.state is RunState.HELD
    fake.full = True
    committer.append(Noted(done))
    committer._cycle()
    fake.full = False
    committer._cycle()
    assert len(done) == 2, "a disk that was full is tried again a second later, not at once"
    now[0] += 1.1
    committer._cycle()
    assert len(done) == 4
    assert run.conditions.state is RunState.HELD, "there is no reserve yet"
    room[0] = True
    now[0] += 1.1
    committer._cycle()
    assert run.conditions.state is RunState.SERVING


def sqlite_error(code: int) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("malformed")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (Refused("HALTED", "stop"), "HALTED", "stop"),
        (RunDirectoryError("step 3 was changed"), "HISTORY_LOST", "step 3 was changed"),
        (
            sqlite_error(sqlite3.SQLITE_CORRUPT),
            "HISTORY_LOST",
            "the journal is damaged .malformed.",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "OUT_OF_RESOURCES", "Too many open files"),
    ],
)
def test_a_question_that_fails_is_refused_with_what_happened(
    tmp_path: Path, error: Exception, reason: str, words: str
) -> None:
    run, fake = Run(ServeConfig(), lambda: 0.0), FakeJournal()
    committer = Committer(run, fake, Reserve(tmp_path, 0), lambda: 0.0, pytest.fail)  # type: ignore[arg-type]

    def question(_: Any) -> None:
        raise error

    future: Future[None] = Future()
    committer._answer(JournalQuery(question, (), future, True))
    with pytest.raises(Refused, match=words) as caught:
        future.result(0)
    assert caught.value.reason == reason


def test_a_question_that_fails_for_an_unknown_reason_ends_the_committer(tmp_path: Path) -> None:
    run, fake = Run(ServeConfig(), lambda: 0.0), FakeJournal()
    committer = Committer(run, fake, Reserve(tmp_path, 0), lambda: 0.0, pytest.fail)  # type: ignore[arg-type]
    for error in (sqlite_error(sqlite3.SQLITE_MISUSE), OSError(errno.EIO, "Input/output error")):

        def question(_: Any, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            committer._answer(JournalQuery(question, (), Future(), True))
    cancelled: Future[None] = Future()
    cancelled.cancel()
    committer._answer(JournalQuery(question, (), cancelled, True))
