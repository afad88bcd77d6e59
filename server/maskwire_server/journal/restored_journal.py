"""A journal rebuilt from the segments and batches of a mirror."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from maskwire_server import failpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.journal.mirror_segment_writer import NOTHING, SegmentWriter, new_instance
from maskwire_server.journal.mirror_segments import (
    BATCHES,
    FOLDER,
    BatchObject,
    Segment,
    hash_of,
    segment_name,
    segment_number,
    split,
)
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.outbox import MirrorState, Outbox, apply
from maskwire_server.journal.run_directory import JOURNAL_FILE, lock
from maskwire_server.journal.schema import FORMAT, TABLES

log = logging.getLogger(__name__)

_DRAFT = f"{JOURNAL_FILE}.restoring"
_CATCH_UP = 8
"""After this many attempts, each of which reads one segment, the newest one is looked up again."""


def restore(
    run_dir: Path, store: ObjectStore, acknowledge: str, check: Callable[[int, bytes], object]
) -> bool:
    """Restore the journal of a run directory that has none; False if the mirror holds no run.

    This process becomes the run's writer, after which the previous writer can add no segment that was not
    read. Before that, `check` is called with the seed and the canonical configuration, and raises if this
    server cannot serve such a run. Raises RunDirectoryError if the mirror is damaged; StoreError.
    """
    newest = _newest(store)
    if not newest:
        return False
    try:
        make_folder(run_dir)
        held = lock(run_dir)
    except OSError as error:
        raise RunDirectoryError(f"{run_dir}: cannot be used as a run directory ({error.strerror})") from error
    try:
        _Restore(run_dir, store, acknowledge).run(newest, check)
    except sqlite3.Error as error:
        raise RunDirectoryError(
            f"{run_dir}: the journal cannot be restored ({error}); check the disk and its free space, and "
            "start again"
        ) from error
    finally:
        os.close(held)
    return True


def _newest(store: ObjectStore) -> int:
    """The number of the newest segment; 0 if there is none."""
    return max(filter(None, map(segment_number, store.names(FOLDER))), default=0)


class _Restore:
    """One restore: segments are applied to a new journal, in order."""

    def __init__(self, run_dir: Path, store: ObjectStore, acknowledge: str) -> None:
        self._run_dir = run_dir
        self._store = store
        self._acknowledge = acknowledge
        self._last: Segment | None = None
        self._written: Segment | None = None  # the last one with changes
        self._hash = ""
        self._batches: dict[str, BatchObject] = {}
        self._gone: list[str] = []  # checkpoints that count as deleted

    def run(self, newest: int, check: Callable[[int, bytes], object]) -> None:
        """Restore, under the lock of the run directory."""
        draft = self._run_dir / _DRAFT
        draft.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(draft.absolute(), isolation_level=None)) as db:
            # The draft is not used before it is renamed, and it is flushed before that.
            db.execute("PRAGMA journal_mode=OFF")
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN")
            for statement in TABLES:
                db.execute(statement)
            writer = self._claim(db, newest, check)
            self._insert_batches(db)
            outbox = Outbox(db)
            outbox.create()
            outbox.keep(
                MirrorState(
                    self._store.address, writer.number, writer.hash, (writer.instance,), complete=True,
                    fetching=True, gone=tuple(self._gone), restored=self._words(db),
                )
            )  # fmt: skip
            db.execute("COMMIT")
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        for suffix in ("-wal", "-shm", "-journal"):  # left by a lost journal: SQLite would replay it
            (self._run_dir / f"{JOURNAL_FILE}{suffix}").unlink(missing_ok=True)
        flush_folder(self._run_dir)
        failpoints.passing("mirror.restoring")
        draft.rename(self._run_dir / JOURNAL_FILE)
        flush_folder(self._run_dir)
        failpoints.passing("mirror.restored")

    def _claim(
        self, db: sqlite3.Connection, newest: int, check: Callable[[int, bytes], object]
    ) -> SegmentWriter:
        """Apply every segment and write the next. If another writer is faster, apply its segment first."""
        self._apply_through(db, newest)
        for attempt in itertools.count(1):
            facts = dict(db.execute("SELECT key, value FROM run").fetchall())
            if self._last is None or "run_id" not in facts:
                raise RunDirectoryError(
                    f"{self._store.address} holds no complete copy of a run: its server was lost during the "
                    "first upload; to start a new run, set storage.mirror to an address that holds nothing"
                )
            check(facts["seed"], facts["canonical"])
            writer = SegmentWriter(
                self._store, facts["run_id"], self._acknowledge, new_instance(), self._last.number, self._hash
            )
            writer.compose(NOTHING)
            failpoints.passing("mirror.claiming")
            found = writer.try_send()
            if found is None:
                failpoints.passing("mirror.claimed")
                return writer
            self._apply(db, found)  # the other writer is alive, and wrote it first
            if attempt % _CATCH_UP == 0:
                self._apply_through(db, _newest(self._store))
        raise AssertionError

    def _apply_through(self, db: sqlite3.Connection, newest: int) -> None:
        """Apply the segments after the last applied one, up to and including `newest`."""
        first = self._last.number + 1 if self._last else 1
        names = [segment_name(number) for number in range(first, newest + 1)]
        for data in self._store.get_all(names):
            self._apply(db, data)

    def _apply(self, db: sqlite3.Connection, data: bytes | None) -> None:
        """Check the next segment, and apply its changes."""
        number = self._last.number + 1 if self._last else 1
        try:
            if data is None:
                raise ValueError("it is missing")
            segment = Segment.decode(data)
            fits = (segment.number, segment.previous) == (number, self._hash)
            if not fits or (self._last and segment.run_id != self._last.run_id):
                raise ValueError("it does not follow the previous segment")
            if segment.journal_format != FORMAT:
                raise ValueError(
                    f"its journal format is {segment.journal_format}, but this version reads {FORMAT}; "
                    "restore with the version that wrote it"
                )
            for change in segment.changes:
                apply(db, change)
        except (ValueError, sqlite3.IntegrityError) as error:
            raise RunDirectoryError(f"{self._store.address}/{segment_name(number)}: {error}") from error
        self._last, self._hash = segment, hash_of(data)
        if segment.changes:
            self._written = segment
        self._batches |= {batches.name: batches for batches in segment.batches}
        for gone in segment.deletes:
            if self._batches.pop(gone, None) is None:
                self._gone.append(gone)

    def _insert_batches(self, db: sqlite3.Connection) -> None:
        """Insert the batches that the mirror has. Recovery raises if it needs a missing one."""
        there = set(self._store.names(BATCHES))
        for name, batches in self._batches.items():
            content = self._store.get(name) if name in there else None
            if content is None:
                log.warning("%s/%s is missing", self._store.address, name)
                continue
            found = split(batches, content)
            if found is None:
                log.warning("%s/%s does not match its hash and is not used", self._store.address, name)
                continue
            db.executemany(
                "INSERT OR REPLACE INTO payloads VALUES (?, ?, ?)",
                [(batches.lineage, step, batch) for step, batch in found],
            )

    def _words(self, db: sqlite3.Connection) -> str:
        """Describe the point to which the run was restored, and what may be lost."""
        lineage = db.execute("SELECT max(lineage) FROM lineages").fetchone()[0]
        step = db.execute(
            "SELECT coalesce((SELECT max(step) FROM steps WHERE lineage = ?1), "
            "(SELECT step FROM lineages WHERE lineage = ?1))",
            (lineage,),
        ).fetchone()[0]
        written = self._written
        assert written is not None
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written.at))
        words = f"step {step} (lineage {lineage}), segment {written.number} of {at}"
        if self._last is not None and self._last.acknowledge == "mirrored":
            return f"{words}; no acknowledged step is lost"
        return f"{words}; steps from {step + 1} on that were acknowledged after that are lost"
