"""The journal's SQLite file: opened under the run directory's lock, written in durable transactions."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from maskwire_server import failpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.disk import FULL, can_write, network_file_system
from maskwire_server.journal.fsync import make_folder
from maskwire_server.journal.outbox import Outbox
from maskwire_server.journal.records import damaged
from maskwire_server.journal.run_directory import JOURNAL_FILE, lock, refuse_leftovers
from maskwire_server.journal.schema import FORMAT, MIGRATIONS, facts_hash
from maskwire_server.journal.write_ahead_log import WriteAheadLog

log = logging.getLogger(__name__)

JournalError = sqlite3.Error
"""A read or write of the journal failed."""
Row = tuple[Any, ...]

_WRITE_FAILED = sqlite3.SQLITE_IOERR_WRITE
_MARGIN = 2**20  # what a transaction writes besides its batches
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)  # SQLite's message may quote damaged bytes


class Database:
    """One connection to the journal's file, used by one thread at a time.

    All writes happen within `transaction`.
    """

    def __init__(self, run_dir: Path, *, durable: bool = True) -> None:
        self._path = run_dir / JOURNAL_FILE
        self._log = WriteAheadLog(run_dir / f"{JOURNAL_FILE}-wal")
        self._log_bytes = 0
        # What the current transaction wrote and deleted.
        self._batch_bytes = self._dropped = self._dropped_bytes = 0
        kind = network_file_system(run_dir.resolve())
        if kind is not None:
            raise RunDirectoryError(
                f"{run_dir}: the run directory is on a network file system ({kind}), whose locks and flushes "
                "are not reliable; choose a directory on a local disk with --run-dir"
            )
        try:
            make_folder(run_dir)
            if not self._path.exists():
                refuse_leftovers(run_dir)
            self._lock = lock(run_dir)
        except OSError as error:
            raise RunDirectoryError(
                f"{run_dir}: cannot be used as a run directory ({error.strerror}); choose another "
                "directory with --run-dir"
            ) from error
        try:
            # Absolute, because some builds would parse a relative path that starts with `file:` as a URI.
            path = self._path.absolute()
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            # NORMAL flushes only in `merge_log`: a power loss loses the last steps and corrupts nothing.
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            # Debian builds SQLite so that it overwrites what is deleted, which takes as long as writing it.
            self._db.execute("PRAGMA secure_delete=FAST")
            # SQLite's automatic WAL checkpoint would stall a step for 10 ms every 64 batches; `merge_log`
            # does it between transactions instead.
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            tables = self._row("SELECT count(*) FROM sqlite_master WHERE name = 'run'")
            self.is_new = tables is None or not tables[0]
            self.outbox = Outbox(self._db)
            """The changes that are not in the mirror yet."""
            if self.is_new:
                refuse_leftovers(run_dir)
            else:
                self._check_format()
            self._measure_log()
        except _UNREADABLE as error:
            self.close()
            if is_full(error):
                raise RunDirectoryError(
                    f"{self._path}: no space is left on its disk ({error}); free some space"
                ) from error
            if "locked" in str(error):
                raise RunDirectoryError(f"{self._path}: another process uses it; stop that one") from error
            raise RunDirectoryError(
                f"{self._path}: the journal is not readable ({error}); restore the run directory from a copy"
            ) from error
        except RunDirectoryError:
            self.close()
            raise

    def _check_format(self) -> None:
        while self.fact("format") in MIGRATIONS:
            migrate = MIGRATIONS[self.fact("format")]
            log.info("%s: %s", self._path, migrate.__doc__)
            self.transaction(partial(migrate, self._db))
        if self.fact("format") != FORMAT:
            raise RunDirectoryError(
                f"{self._path}: the journal's format is {self.fact('format')}, but this version reads "
                f"formats up to {FORMAT}; use the version of maskwire that wrote it"
            )
        if self.fact("hash") != facts_hash(self._db):
            raise damaged("the record of the run's identity")

    def fact(self, key: str) -> Any:
        """A fact about the run, such as its id or seed; None if no fact has that name."""
        row = self._row("SELECT value FROM run WHERE key = ?", key)
        return None if row is None else row[0]

    def _row(self, statement: str, *values: object) -> Row | None:
        """The first row that a query finds; None if it finds none."""
        row: Row | None = self._db.execute(statement, values).fetchone()
        return row

    def _rows(self, statement: str, *values: object) -> list[Row]:
        """All rows that a query finds. Reads them at once: an open statement keeps the file locked."""
        return self._db.execute(statement, values).fetchall()

    def transaction(self, write: Callable[[], object]) -> None:
        """Run `write` in one durable transaction, which is rolled back if `write` raises an error."""
        failpoints.passing("journal.begin")
        self._batch_bytes = self._dropped = self._dropped_bytes = 0
        self._db.execute("BEGIN IMMEDIATE")
        try:
            write()
            if self.outbox.active:
                self.outbox.mark()
            failpoints.passing("journal.written")
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._raise_if_over_quota(error, self._batch_bytes + _MARGIN)
            raise
        finally:
            self._measure_log()
        failpoints.passing("journal.committed")
        if self.outbox.active:
            self.outbox.measure()

    def _raise_if_over_quota(self, error: BaseException, size: int) -> None:
        """Raise an error that `is_full` recognises if a write of about `size` bytes exceeded a quota.

        SQLite distinguishes a full disk from other errors, but reports an exceeded quota as an I/O error.
        """
        failed = getattr(error, "sqlite_errorcode", None) == _WRITE_FAILED
        if failed and not can_write(self._path.parent, size):
            full = sqlite3.OperationalError("no space is left on the disk or within its quota")
            full.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise full from error

    def merge_log(self, *, truncate: bool = False) -> None:
        """Merge the write-ahead log into the database file, and flush everything.

        The log's file is kept and overwritten from its start, which is faster than letting it grow. With
        `truncate`, its space is freed instead.
        """
        failpoints.passing("journal.tidying")
        growth = self.growth()
        try:
            mode = "TRUNCATE" if truncate else "RESTART"
            ((busy, *_),) = self._db.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
            if not busy:
                self._log.merged()
        except sqlite3.Error as error:
            self._raise_if_over_quota(error, growth + _MARGIN)
            raise
        finally:
            self._measure_log()
        failpoints.passing("journal.tidied")

    def growth(self) -> int:
        """The number of bytes by which the database file grows when the log is merged into it."""
        pages = int(self._db.execute("PRAGMA page_count").fetchone()[0])
        size = int(self._db.execute("PRAGMA page_size").fetchone()[0])
        return max(0, pages * size - self._path.stat().st_size)

    def log_bytes(self) -> int:
        """The bytes of the write-ahead log that were not merged after the last transaction or merge.

        Can be called from any thread, and makes no system call.
        """
        return self._log_bytes

    def log_file_bytes(self) -> int:
        """The size of the write-ahead log's file in bytes."""
        return self._log.size()

    def _measure_log(self) -> None:
        self._log_bytes = self._log.used_bytes()

    def close(self) -> None:
        """Close the journal's file, and release the run directory."""
        if hasattr(self, "_db"):  # absent if the file could not be opened
            self._db.close()
        self._log.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_full(error: BaseException | None) -> bool:
    """Whether an error means that a write failed for lack of space, and can be retried later."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def is_damaged(error: BaseException) -> bool:
    """Whether an error means that SQLite found its file damaged."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextlib.contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Raise each SQLite error as a RunDirectoryError whose message says what to do."""
    try:
        yield
    except _UNREADABLE as error:
        cure = (
            "free some space"
            if is_full(error)
            else "check the disk, or restore the run directory from a copy"
        )
        raise RunDirectoryError(f"{run_dir}: the journal cannot be used ({error}); {cure}") from error
