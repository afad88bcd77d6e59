"""Space on the journal's disk: the reserve, and merging the write-ahead log into the database."""

from __future__ import annotations

import logging
from pathlib import Path

from maskwire_server.journal.database import JournalError, is_full
from maskwire_server.journal.disk import free_bytes
from maskwire_server.journal.journal import Journal

log = logging.getLogger(__name__)

MERGE_BYTES = 16 * 2**20
"""The write-ahead log is merged into the database when it reaches this size."""
WRITES_PER_BATCH = 2
"""A batch is written to the write-ahead log, and later to the database file."""


class Reserve:
    """Space that is kept free on the journal's disk, so that a computed step can be committed."""

    def __init__(self, run_dir: Path, reserve_bytes: int) -> None:
        self._run_dir = run_dir
        self._reserve_bytes = reserve_bytes

    def left(self, waiting: int) -> int:
        """The free bytes beyond the reserve and `waiting` bytes; negative if there are too few."""
        return free_bytes(self._run_dir) - self._reserve_bytes - waiting

    def fits(self, size: int) -> bool:
        """Whether `size` bytes fit on the disk if the reserve may be used."""
        return size <= free_bytes(self._run_dir)


def merge_log(journal: Journal, *, truncate: bool = False) -> bool:
    """Merge the write-ahead log into the database. Returns False and changes nothing if the disk is full."""
    try:
        journal.merge_log(truncate=truncate)
    except JournalError as error:
        if not is_full(error):
            raise
        log.warning(
            "not enough disk space to merge the write-ahead log into the database; nothing is lost, and the "
            "server tries again later"
        )
        return False
    return True


def free_log_space(journal: Journal, reserve: Reserve) -> bool:
    """Merge the write-ahead log into the database, and free its space. Returns whether this succeeded.

    The database file grows first, by less than the log's size. It may use the reserve, because no step is
    committed at the same time.
    """
    return (
        bool(journal.log_file_bytes())
        and reserve.fits(journal.growth())
        and merge_log(journal, truncate=True)
    )
