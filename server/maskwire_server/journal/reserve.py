"""Room on the journal's disk: the reserve that is kept free, and folding the log to make some."""

from __future__ import annotations

import logging
from pathlib import Path

from maskwire_server.journal.database import JournalError, is_full
from maskwire_server.journal.disk import free_bytes
from maskwire_server.journal.journal import Journal

log = logging.getLogger(__name__)

FOLD_BYTES = 16 * 2**20
"""The size of the journal's write-ahead log from which on it is folded into the database."""
WRITES_PER_BATCH = 2
"""A batch is written into the write-ahead log, and from there into the database."""


class Reserve:
    """The room that is kept on the journal's disk, so that a step that was computed can be committed."""

    def __init__(self, run_dir: Path, reserve_bytes: int) -> None:
        self._run_dir = run_dir
        self._reserve_bytes = reserve_bytes

    def left(self, waiting: int) -> int:
        """Bytes that may be written beside the reserve and `waiting` others; negative: they do not fit."""
        return free_bytes(self._run_dir) - self._reserve_bytes - waiting

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be written, the reserve used up."""
        return size <= free_bytes(self._run_dir)


def fold(journal: Journal) -> bool:
    """Fold the journal's log into the database; False without room: it stays as it is."""
    try:
        journal.tidy()
    except JournalError as error:
        if not is_full(error):
            raise
        log.warning("no room to fold the journal's log; what is in it is safe, and it is tried again")
        return False
    return True


def make_room(journal: Journal, reserve: Reserve) -> bool:
    """Fold the journal's log where that frees room; False when it does not, or there is none for it.

    The database grows first, by less than the log takes, and may use the reserve for that moment: no
    step is committed meanwhile.
    """
    return bool(journal.log_bytes()) and reserve.fits(journal.growth()) and fold(journal)
