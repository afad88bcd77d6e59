"""What the committer does while the disk has no room, turn by turn."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskwire.v1.values import RunState
from maskwire_server.config import ServeConfig
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.shared_state import Run
from maskwire_server.journal.reserve import Reserve


class FakeJournal:
    full = False

    def log_bytes(self) -> int:
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
