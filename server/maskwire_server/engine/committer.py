"""What waits to become durable: several steps share one transaction, and answers wait for it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from maskwire_server.engine.state import Standing
from maskwire_server.journal.disk import free_bytes
from maskwire_server.journal.journal import Journal, is_full
from maskwire_server.results import RunState

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
FOLD_BYTES = 16 * 2**20  # of the journal's write-ahead log, before it is folded into the database


class Commits:
    """Writes in order, then what follows from their being durable. Only the engine's thread calls it."""

    def __init__(
        self,
        journal: Journal,
        standing: Standing,
        clock: Callable[[], float],
        reserve: Reserve,
    ) -> None:
        self._reserve = reserve
        self._journal = journal
        self._standing = standing
        self._clock = clock
        self._writes: list[Callable[[], object]] = []
        self._after: list[Callable[[], None]] = []
        self._fold_after = 0.0  # a fold without room is tried again only then
        self._retry_at: float | None = None
        self._failed = False  # the last commit met a full disk: the same bytes wait for the next try

    @property
    def pending(self) -> bool:
        """Something is not durable, or not answered."""
        return bool(self._writes or self._after)

    @property
    def retry_at(self) -> float | None:
        """When a journal without room is tried again; None while it has room."""
        return self._retry_at

    def add(self, write: Callable[[], object], after: Callable[[], None]) -> None:
        """Write in the next transaction, and once it is durable call `after`."""
        self._writes.append(write)
        self._after.append(after)

    def after(self, act: Callable[[], None]) -> None:
        """Call `act` once everything written so far is durable."""
        self._after.append(act)

    def flush(self) -> None:
        """Commit, then answer. Without room the same bytes wait, and the state is HELD.

        Raises sqlite3.Error for everything else: the outcome is unknown and the process must end.
        """
        early = self._retry_at is not None and self._clock() < self._retry_at
        if self._failed and early:
            return
        if self._retry_at is not None and not early:
            self.make_room()
        written = bool(self._writes)
        if self._writes:  # also while held for the reserve: it is kept for what was computed
            try:
                self._journal.transaction(lambda: [write() for write in self._writes])
            except sqlite3.Error as error:
                if not is_full(error):
                    raise
                log.error("the journal cannot be written: %s", error)
                self._failed = True
                self.hold()
                return
        self._failed = False
        if self._retry_at is not None and not early:
            if self._reserve.left(self._journal.log_bytes()) >= 0:
                log.warning("the journal has room again; nothing was lost")
                self._retry_at = None
                self._standing.set(RunState.HELD, False)
            else:
                self._retry_at = self._clock() + RETRY_SECONDS
        after, self._writes, self._after = self._after, [], []
        for act in after:
            act()
        if written and self._journal.log_bytes() >= FOLD_BYTES and self._clock() >= self._fold_after:
            self.fold()

    def fold(self) -> bool:
        """Fold the journal's log away; False without room: it stays as it is, and is folded another time."""
        if fold(self._journal):
            return True
        self._fold_after = self._clock() + RETRY_SECONDS
        return False

    def make_room(self) -> bool:
        """Fold the log away if the database has room to take it in: that frees what the log takes."""
        return make_room(self._journal, self._reserve)

    def hold(self) -> None:
        """Nothing is admitted from now on, until there is room on the journal's disk."""
        if self._retry_at is None:
            log.error("no room on the journal's disk: nothing is admitted until there is")
        self._retry_at = self._clock() + RETRY_SECONDS
        self._standing.set(RunState.HELD, waiting_for="room on the journal's disk")


def fold(journal: Journal) -> bool:
    """Fold the journal's log away; False without room, and it stays as it is."""
    try:
        journal.tidy()
    except sqlite3.Error as error:
        if not is_full(error):
            raise
        log.warning("no room to fold the journal's log; what is in it is safe, and it is tried again")
        return False
    return True


def make_room(journal: Journal, reserve: Reserve) -> bool:
    """Fold the journal's log away where that frees room; False when it does not, or there is none for it.

    The database grows first, by less than the log takes, and may use the reserve for that moment: no
    step is committed meanwhile.
    """
    return bool(journal.log_bytes()) and reserve.fits(journal.growth()) and fold(journal)


class Reserve:
    """The room that is kept on the journal's disk, so that a step that was computed can be committed."""

    def __init__(self, run_dir: Path, reserve_bytes: int) -> None:
        self._run_dir = run_dir
        self._reserve_bytes = reserve_bytes

    def left(self, waiting: int) -> int:
        """Bytes that may be written beside it and `waiting` others; negative: it is not there."""
        return free_bytes(self._run_dir) - self._reserve_bytes - waiting

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be written, the reserve used up."""
        return size <= free_bytes(self._run_dir)
