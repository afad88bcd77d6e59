"""The journal: what happened, in order, in one SQLite file that one thread of one process writes.

A step exists if and only if its row is durable. Its batch is kept beside it until checkpoints cover it,
so that the step can be computed again; rows stay for ever, so that a recorded answer can always be
given. Each row carries a hash of itself, because a flipped bit in the middle of SQLite's write-ahead log
drops what follows without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maskwire.v1.digest import DigestVersion
from maskwire_server import failpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.disk import FULL, has_room, network_file_system, of_volume
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.journal.records import Lineage, SessionRecord, StepRecord, Stretch, damaged, seal

log = logging.getLogger(__name__)

FORMAT = 4
FILE_NAME = "journal.sqlite"
_SESSION = "epoch, client_name, nonce, takeover, lineage, step, closed, row_hash"
_PAGE = 64  # records read at once
_WRITE_FAILED = sqlite3.SQLITE_IOERR_WRITE
_MARGIN = 2**20  # of a transaction, beside its batches
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)  # the second: of a message that quotes damaged bytes

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE lineages (
  lineage INTEGER PRIMARY KEY, parent INTEGER, step INTEGER NOT NULL, digest BLOB NOT NULL,
  request_id TEXT UNIQUE, checkpoint TEXT, at REAL NOT NULL, row_hash BLOB);
CREATE TABLE sessions (
  epoch INTEGER PRIMARY KEY, client_name TEXT NOT NULL, nonce TEXT UNIQUE, takeover INTEGER NOT NULL,
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, closed INTEGER NOT NULL, at REAL NOT NULL, row_hash BLOB);
CREATE TABLE steps (
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, request_id TEXT, configuration INTEGER NOT NULL,
  payload_hash BLOB NOT NULL, outcome INTEGER NOT NULL, numbers BLOB NOT NULL, digest BLOB NOT NULL,
  row_hash BLOB NOT NULL, PRIMARY KEY (lineage, step)) WITHOUT ROWID;
CREATE INDEX steps_by_request ON steps (request_id) WHERE request_id IS NOT NULL;
CREATE TABLE payloads (
  lineage INTEGER NOT NULL, step INTEGER NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (lineage, step));
"""


class Journal:
    """One connection, used by one thread at a time; every method but the readers is a transaction's part."""

    def __init__(self, run_dir: Path, *, durable: bool = True) -> None:
        self._path = run_dir / FILE_NAME
        self._batch_bytes = 0  # of the transaction under way
        kind = network_file_system(run_dir.resolve())
        if kind is not None:
            raise RunDirectoryError(
                f"{run_dir}: is on a network file system ({kind}), whose locks and flushes cannot be relied "
                "on; choose a disk of this machine with --run-dir"
            )
        try:
            make_folder(run_dir)
            if not self._path.exists():
                _refuse_leftovers(run_dir)
            self._lock = _lock(run_dir)
        except OSError as error:
            raise RunDirectoryError(
                f"{run_dir}: cannot be used as a run directory ({error.strerror}); choose another with "
                "--run-dir"
            ) from error
        try:
            # Absolute: builds of SQLite that read URIs everywhere take a relative `file:...` for one.
            place = self._path.absolute()
            self._db = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            # NORMAL flushes only in `tidy`: a power loss takes the last steps, and tears nothing.
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            # SQLite's own checkpoint comes in the middle of a step every 64 batches and stalls it for
            # 10 ms; `tidy` makes it between steps instead.
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            tables = self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'run'").fetchone()
            self.is_new = not tables[0]
            if self.is_new:
                _refuse_leftovers(run_dir)
            else:
                self._check_format()
        except _UNREADABLE as error:
            self.close()
            if is_full(error):
                raise RunDirectoryError(f"{self._path}: no room on its disk ({error}); make room") from error
            if "locked" in str(error):
                raise RunDirectoryError(f"{self._path}: another process uses it; stop that one") from error
            raise RunDirectoryError(
                f"{self._path}: not a readable journal ({error}); restore the run directory from a copy"
            ) from error
        except RunDirectoryError:
            self.close()
            raise

    def _check_format(self) -> None:
        while self.fact("format") in _MIGRATIONS:
            step = _MIGRATIONS[self.fact("format")]
            log.info("%s: %s", self._path, step.__doc__)
            self.transaction(partial(step, self._db))
        if self.fact("format") != FORMAT:
            raise RunDirectoryError(
                f"{self._path}: format {self.fact('format')}, this version reads up to {FORMAT}; use the "
                "version that wrote it"
            )
        if self.fact("hash") != _facts_hash(self._db):
            raise damaged("what the run is")

    def create(self, facts: dict[str, Any], digest: bytes) -> None:
        """Begin a run: its facts, and lineage 1 at step 0 with `digest`."""

        def write() -> None:
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            for key, value in {"format": FORMAT, **facts}.items():
                self._db.execute("INSERT INTO run VALUES (?, ?)", (key, value))
            self._db.execute("INSERT INTO run VALUES ('hash', ?)", (_facts_hash(self._db),))
            self.add_lineage(Lineage(1, None, 0, digest, None, None))

        failpoints.passing("journal.creating")
        self.transaction(write)
        failpoints.passing("journal.created")
        flush_folder(self._path.parent)
        self.is_new = False

    def transaction(self, write: Callable[[], object]) -> None:
        """Run `write` in one durable transaction; it leaves no trace if it raises."""
        failpoints.passing("journal.begin")
        self._batch_bytes = 0
        self._db.execute("BEGIN IMMEDIATE")
        try:
            write()
            failpoints.passing("journal.written")
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._raise_if_over_quota(error, self._batch_bytes + _MARGIN)
            raise
        failpoints.passing("journal.committed")

    def _raise_if_over_quota(self, error: BaseException, size: int) -> None:
        """Raise what `is_full` knows when a write of about `size` bytes failed because a quota is used up.

        SQLite tells a full disk from other errors, but calls a used-up quota an I/O error.
        """
        failed = getattr(error, "sqlite_errorcode", None) == _WRITE_FAILED
        if failed and not has_room(self._path.parent, size):
            full = sqlite3.OperationalError("the disk, or the quota on it, has no room")
            full.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise full from error

    def fact(self, key: str) -> Any:
        """A fact that `create` was given."""
        row = self._db.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def digest_version(self) -> DigestVersion | None:
        """The version of the run's digest; None before the first step."""
        number = self.fact("digest_version")
        return None if number is None else DigestVersion(number, self.fact("num_tokens") or 0)

    def fix_digest_version(self, version: DigestVersion) -> None:
        """Record the version of the run's digest, with the run's first step."""
        facts = {"digest_version": version.number, "num_tokens": version.num_tokens}
        self._db.executemany("INSERT INTO run VALUES (?, ?)", facts.items())
        self._db.execute("UPDATE run SET value = ? WHERE key = 'hash'", (_facts_hash(self._db),))

    def add_event(self, kind: str, body: dict[str, Any]) -> int:
        """Record something that happened beside the steps, and return its id."""
        text = json.dumps(body, sort_keys=True)
        cursor = self._db.execute(
            "INSERT INTO events (at, kind, body) VALUES (?, ?, ?)", (time.time(), kind, _hash(text) + text)
        )
        return int(cursor.lastrowid or 0)

    def event(self, event_id: int) -> dict[str, Any]:
        """The body of an event. Raises RunDirectoryError when it is not there, or damaged."""
        row = self._db.execute("SELECT body FROM events WHERE id = ?", (event_id,)).fetchone()
        return _body(event_id, None if row is None else row[0])

    def last_event(self, kind: str) -> tuple[int, dict[str, Any]] | None:
        """The newest event of a kind: its id and body."""
        row = self._db.execute(
            "SELECT id, body FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1", (kind,)
        ).fetchone()
        return None if row is None else (row[0], _body(row[0], row[1]))

    def events(self, kind: str) -> list[tuple[float, dict[str, Any]]]:
        """When each event of a kind happened, and its body, the oldest first."""
        rows = self._db.execute("SELECT id, at, body FROM events WHERE kind = ? ORDER BY id", (kind,))
        return [(at, _body(event_id, body)) for event_id, at, body in rows.fetchall()]

    def add_step(self, record: StepRecord, payload: bytes) -> None:
        """Append a step, with the batch that computes it again."""
        self._batch_bytes += len(payload)
        self._db.execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.lineage,
                record.step,
                record.request_id,
                record.configuration,
                record.payload_hash,
                int(record.outcome),
                record.numbers(),
                record.digest,
                record.row_hash(),
            ),
        )
        self._db.execute("INSERT INTO payloads VALUES (?, ?, ?)", (record.lineage, record.step, payload))

    def step(self, lineage: int, step: int) -> StepRecord | None:
        """The record of a step."""
        row = self._db.execute(
            "SELECT * FROM steps WHERE lineage = ? AND step = ?", (lineage, step)
        ).fetchone()
        return None if row is None else StepRecord.read(row)

    def last_step(self, lineage: int) -> StepRecord | None:
        """The newest record of a lineage."""
        row = self._db.execute(
            "SELECT * FROM steps WHERE lineage = ? ORDER BY step DESC LIMIT 1", (lineage,)
        ).fetchone()
        return None if row is None else StepRecord.read(row)

    def steps_between(self, lineage: int, first: int, last: int | None, count: int) -> list[StepRecord]:
        """The records of a lineage from step `first` up to and with `last`, in order, at most `count`."""
        rows = self._db.execute(
            "SELECT * FROM steps WHERE lineage = ? AND step >= ? AND step <= ? ORDER BY step LIMIT ?",
            (lineage, first, 2**63 - 1 if last is None else last, count),
        ).fetchall()
        return [StepRecord.read(row) for row in rows]

    def step_of_request(self, request_id: str) -> StepRecord | None:
        """The newest record of a request id; a session that names its step may use one again."""
        row = self._db.execute(
            "SELECT * FROM steps WHERE request_id = ? ORDER BY lineage DESC, step DESC LIMIT 1", (request_id,)
        ).fetchone()
        return None if row is None else StepRecord.read(row)

    def steps_after(self, lineage: int, step: int) -> Iterator[tuple[StepRecord, bytes | None]]:
        """The records of a lineage behind `step`, in order, with their batches where still kept."""
        while True:
            # A page at a time: a statement left unfinished would keep the file locked after `close`.
            rows = self._db.execute(
                "SELECT s.*, p.payload FROM steps s LEFT JOIN payloads p USING (lineage, step) "
                "WHERE s.lineage = ? AND s.step > ? ORDER BY s.step LIMIT ?",
                (lineage, step, _PAGE),
            ).fetchall()
            for row in rows:
                yield StepRecord.read(row[:-1]), row[-1]
            if len(rows) < _PAGE:
                return
            step = rows[-1][1]

    def check_requests(self, lineage: int, count: int = 10_000) -> int:
        """Read the newest records of a lineage, and look each of their request ids up.

        The index that finds them has no hash of its own: where it misses one it is built anew from the
        records. How many it missed. Raises RunDirectoryError for a damaged record.
        """
        rows = self._db.execute(
            "SELECT n.*, i.step FROM (SELECT * FROM steps WHERE lineage = ? ORDER BY step DESC LIMIT ?) n "
            "LEFT JOIN steps i INDEXED BY steps_by_request ON i.request_id = n.request_id "
            "AND i.lineage = n.lineage AND i.step = n.step",
            (lineage, count),
        )
        missed = 0
        for row in rows.fetchall():
            record = StepRecord.read(row[:-1])
            missed += record.request_id is not None and row[-1] != record.step
        if missed:
            log.warning("the journal's index of request ids was damaged; it is built anew from the records")
            self._db.execute("REINDEX steps_by_request")
        return missed

    def drop_payloads(self, stretches: Sequence[Stretch], most: int) -> bool:
        """Delete at most so many batches of these steps; whether there may be more. Their records stay."""
        failpoints.passing("payloads.dropping")
        for gone in stretches:
            cursor = self._db.execute(
                "DELETE FROM payloads WHERE rowid IN (SELECT rowid FROM payloads "
                "WHERE lineage = ? AND step > ? AND step <= ? LIMIT ?)",
                (gone.lineage, gone.after, gone.through, most),
            )
            most -= cursor.rowcount
            if not most:
                return True
        return False

    def add_lineage(self, lineage: Lineage) -> None:
        """Open a line of history."""
        self._db.execute(
            "INSERT INTO lineages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                lineage.lineage,
                lineage.parent,
                lineage.step,
                lineage.digest,
                lineage.request_id,
                lineage.checkpoint,
                time.time(),
                lineage.row_hash(),
            ),
        )

    def lineages(self) -> dict[int, Lineage]:
        """Every line of history."""
        rows = self._db.execute(
            "SELECT lineage, parent, step, digest, request_id, checkpoint, row_hash FROM lineages "
            "ORDER BY lineage"
        )
        return {row[0]: Lineage.read(row) for row in rows}

    def lineage_at(self, at: float) -> int:
        """The newest lineage at a time."""
        row = self._db.execute("SELECT max(lineage) FROM lineages WHERE at <= ?", (at,)).fetchone()
        return int(row[0] or 1)

    def add_session(self, session: SessionRecord) -> None:
        """Open an epoch, or write its record anew."""
        self._db.execute(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                session.epoch,
                session.client_name,
                session.nonce,
                session.takeover,
                session.lineage,
                session.step,
                session.closed,
                time.time(),
                session.row_hash(),
            ),
        )

    def close_session(self, epoch: int) -> None:
        """Mark an epoch's session as closed by its owner."""
        session = self._session("WHERE epoch = ?", epoch)
        if session is not None:
            self.add_session(replace(session, closed=True))

    def last_session(self) -> SessionRecord | None:
        """The newest epoch."""
        return self._session("ORDER BY epoch DESC LIMIT 1")

    def last_takeover(self) -> SessionRecord | None:
        """The newest epoch that was opened with takeover."""
        return self._session("WHERE takeover ORDER BY epoch DESC LIMIT 1")

    def session_of_nonce(self, nonce: str) -> SessionRecord | None:
        """The epoch that a nonce was given."""
        return self._session("WHERE nonce = ?", nonce)

    def _session(self, where: str, *values: object) -> SessionRecord | None:
        row = self._db.execute(
            f"SELECT {_SESSION} FROM sessions {where}",
            values,
        ).fetchone()
        return None if row is None else SessionRecord.read(row)

    def tidy(self) -> None:
        """Fold the write-ahead log into the database, between steps; everything is flushed then."""
        failpoints.passing("journal.tidying")
        growth = self.growth()
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            self._raise_if_over_quota(error, growth + _MARGIN)
            raise
        failpoints.passing("journal.tidied")

    def growth(self) -> int:
        """The bytes that the database file grows by when the log is folded into it."""
        pages = int(self._db.execute("PRAGMA page_count").fetchone()[0])
        size = int(self._db.execute("PRAGMA page_size").fetchone()[0])
        return max(0, pages * size - self._path.stat().st_size)

    def damage(self) -> list[str]:
        """What SQLite finds wrong with its pages and indexes, and which events were changed; it reads all."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(20)")]
        problems = [f"journal: {words}" for words in found if words != "ok"]
        for event_id, body in self._db.execute("SELECT id, body FROM events"):
            try:
                _body(event_id, body)
            except RunDirectoryError as error:
                problems.append(str(error))
        sessions = self._db.execute(f"SELECT {_SESSION} FROM sessions").fetchall()
        for row in sessions:
            try:
                SessionRecord.read(row)
            except RunDirectoryError as error:
                problems.append(str(error))
        missing = self._db.execute(
            "SELECT DISTINCT configuration FROM steps WHERE configuration NOT IN "
            "(SELECT id FROM events WHERE kind = 'configuration')"
        )
        problems += [f"journal: event {row[0]}, the configuration of steps, is missing" for row in missing]
        return problems

    def log_bytes(self) -> int:
        """The size of the write-ahead log."""
        try:
            return self._path.with_name(FILE_NAME + "-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close the file and release the run directory."""
        if hasattr(self, "_db"):  # not where it could not be opened
            self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of space, so that the same bytes can be tried again."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


@contextlib.contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """What SQLite says of a journal that it cannot use, in words that help: RunDirectoryError."""
    try:
        yield
    except _UNREADABLE as error:
        cure = "make room" if is_full(error) else "look at the disk, or restore the run directory from a copy"
        raise RunDirectoryError(f"{run_dir}: the journal cannot be used ({error}); {cure}") from error


def _facts_hash(database: sqlite3.Connection) -> bytes:
    rows = database.execute("SELECT key, value FROM run WHERE key NOT IN ('format', 'hash') ORDER BY key")
    return seal(*[(key, value.hex() if isinstance(value, bytes) else value) for key, value in rows])


def _seal_rows(database: sqlite3.Connection) -> None:
    """format 1 becomes 2: every row has a hash of itself"""
    for table in ("lineages", "sessions"):
        database.execute(f"ALTER TABLE {table} ADD COLUMN row_hash BLOB")
    columns = "lineage, parent, step, digest, request_id, checkpoint"
    for row in database.execute(f"SELECT {columns} FROM lineages").fetchall():
        database.execute(
            "UPDATE lineages SET row_hash = ? WHERE lineage = ?", (Lineage(*row).row_hash(), row[0])
        )
    columns = "epoch, client_name, nonce, takeover, lineage, step, closed"
    for epoch, name, nonce, takeover, lineage, step, closed in database.execute(
        f"SELECT {columns} FROM sessions"
    ).fetchall():
        session = SessionRecord(epoch, name, nonce, bool(takeover), lineage, step, bool(closed))
        database.execute("UPDATE sessions SET row_hash = ? WHERE epoch = ?", (session.row_hash(), epoch))
    for event_id, body in database.execute("SELECT id, body FROM events").fetchall():
        if body.startswith("{"):
            database.execute("UPDATE events SET body = ? WHERE id = ?", (_hash(body) + body, event_id))
    database.execute("UPDATE run SET value = 2 WHERE key = 'format'")
    database.execute("INSERT INTO run VALUES ('hash', ?)", (_facts_hash(database),))


def _allow_ids_twice(database: sqlite3.Connection) -> None:
    """format 2 becomes 3: a session that names its step may use a request id again"""
    database.execute("DROP INDEX steps_by_request")
    database.execute("CREATE INDEX steps_by_request ON steps (request_id) WHERE request_id IS NOT NULL")
    database.execute("UPDATE run SET value = 3 WHERE key = 'format'")


def _record_digest_version(database: sqlite3.Connection) -> None:
    """format 3 becomes 4: the run records the version of its digest, which is 1 where it has steps"""
    sealed = database.execute("SELECT value FROM run WHERE key = 'hash'").fetchone()
    if sealed is None or sealed[0] != _facts_hash(database):  # or the new hash would hide the damage
        raise damaged("what the run is")
    if database.execute("SELECT EXISTS (SELECT 1 FROM steps)").fetchone()[0]:
        database.execute("INSERT INTO run VALUES ('digest_version', 1)")
        database.execute("UPDATE run SET value = ? WHERE key = 'hash'", (_facts_hash(database),))
    database.execute("UPDATE run SET value = 4 WHERE key = 'format'")


_MIGRATIONS = {1: _seal_rows, 2: _allow_ids_twice, 3: _record_digest_version}
"""From each older format to the next, in one transaction."""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _body(event_id: int, stored: object) -> dict[str, Any]:
    text = stored if isinstance(stored, str) else ""  # a changed byte can change a value's type
    if _hash(text[64:]) != text[:64]:
        raise damaged(f"event {event_id}, which may be missing,")
    return dict(json.loads(text[64:]))


def _lock(run_dir: Path) -> int:
    # A file of its own: closing any descriptor of the database would drop SQLite's locks on it.
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunDirectoryError(
            f"{run_dir}: another server (process {holder or 'unknown'}) uses this run directory; stop it, "
            "or choose another with --run-dir"
        ) from None
    try:  # for whoever finds the directory in use
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        if error.errno not in FULL:
            os.close(descriptor)
            raise
    return descriptor


def _refuse_leftovers(run_dir: Path) -> None:
    strange = sorted(
        path.name
        for path in run_dir.iterdir()
        if path.name != "lock"
        and not path.name.startswith(FILE_NAME)
        and path.suffix not in (".toml", ".log")
        and not of_volume(path.name)
    )
    if strange == ["checkpoints"]:
        raise RunDirectoryError(
            f"{run_dir}: checkpoints without a journal: the journal was lost; restore {FILE_NAME} from a "
            "copy, or start a new run in an empty directory"
        )
    if strange:
        raise RunDirectoryError(
            f"{run_dir}: a new run needs an empty directory, found {', '.join(strange[:3])}; choose another "
            "with --run-dir"
        )
