"""A journal rebuilt from the segments and batches of a mirror."""

from __future__ import annotations

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
"""After this many attempts, each of which reads one segment, the newest segment is looked up again."""


def restore(
    run_dir: Path, store: ObjectStore, acknowledge: str, check: Callable[[int, bytes], object]
) -> bool:
    """Restore a run directory's missing journal from the mirror. Returns False if the mirror has no run.

    This process becomes the run's writer, so the previous writer cannot add a segment that this process has
    not read. Before that, `check` is called with the seed and the canonical configuration, and raises an
    error if this server cannot serve such a run. Raises RunDirectoryError if the mirror is damaged, and
    StoreError if the store fails.
    """
    newest = _newest(store)
    if not newest:
        return False
    try:
        make_folder(run_dir)
        held = lock(run_dir)
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir}: cannot be used as a run directory ({error.strerror}); choose another directory with "
            "--run-dir"
        ) from error
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
    """The number of the newest segment in the store; 0 if there is none."""
    return max(filter(None, map(segment_number, store.names(FOLDER))), default=0)


class _Copy:
    """A draft of the restored journal: one upload of the complete journal, and the changes after it."""

    def __init__(self, draft: Path, batches: dict[str, BatchObject]) -> None:
        self.draft = draft
        self.batches = batches
        self.written: Segment
        self.problem = ""
        """Why the draft cannot be used; empty if it can."""
        self.db = sqlite3.connect(draft.absolute(), isolation_level=None)
        # The draft is not used before it is renamed, and it is flushed before that.
        self.db.execute("PRAGMA journal_mode=OFF")
        self.db.execute("PRAGMA synchronous=OFF")
        self.db.execute("BEGIN")
        for statement in TABLES:
            self.db.execute(statement)

    def apply(self, segment: Segment) -> None:
        """Apply a segment's changes. Raises ValueError or sqlite3.IntegrityError if they do not fit."""
        self.written = segment
        self.batches |= {batches.name: batches for batches in segment.batches}
        if self.problem:
            return
        if segment.journal_format != FORMAT:
            raise ValueError(
                f"the segment's journal format is {segment.journal_format}, but this version reads {FORMAT}; "
                "restore with the version that wrote the segment"
            )
        for change in segment.changes[segment.begins_upload :]:
            apply(self.db, change)

    def step(self) -> tuple[int, int]:
        """The newest lineage in the draft, and its last step."""
        lineage = self.db.execute("SELECT max(lineage) FROM lineages").fetchone()[0]
        (step,) = self.db.execute(
            "SELECT coalesce((SELECT max(step) FROM steps WHERE lineage = ?1), "
            "(SELECT step FROM lineages WHERE lineage = ?1))",
            (lineage,),
        ).fetchone()
        return lineage, step

    def discard(self) -> None:
        """Delete the draft."""
        self.db.close()
        self.draft.unlink(missing_ok=True)


class _Restore:
    """One restore. Segments are applied in order, to one draft per upload of the complete journal.

    A later upload replaces an earlier one as soon as it is complete. Until then, the run can only be restored
    from the earlier upload.
    """

    def __init__(self, run_dir: Path, store: ObjectStore, acknowledge: str) -> None:
        self._run_dir = run_dir
        self._store = store
        self._acknowledge = acknowledge
        self._last: Segment | None = None
        self._hash = ""
        self._copy: _Copy | None = None
        self._unfinished: _Copy | None = None  # a later upload that is not complete
        self._lossless = False  # the value of `lossless` for the last segment
        self._gone: list[str] = []  # checkpoints that count as deleted

    def run(self, newest: int, check: Callable[[int, bytes], object]) -> None:
        """Restore the journal. The caller holds the lock of the run directory."""
        for left in self._run_dir.glob(f"{_DRAFT}*"):
            left.unlink()
        try:
            copy, writer = self._claim(newest, check)
            self._insert_batches(copy)
            outbox = Outbox(copy.db)
            outbox.create()
            outbox.keep(
                MirrorState(
                    self._store.address, writer.number, writer.hash, (writer.instance,),
                    complete=self._unfinished is None, fetching=True, gone=tuple(self._gone),
                    restored=self._words(copy), lost=self._lost(copy), journal_format=FORMAT,
                )
            )  # fmt: skip
            copy.db.execute("COMMIT")
            copy.db.close()
            self._rename(copy.draft)
        finally:
            for each in (self._copy, self._unfinished):
                if each is not None:
                    each.discard()

    def _rename(self, draft: Path) -> None:
        """Make a finished draft the run directory's journal."""
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        for suffix in ("-wal", "-shm", "-journal"):  # left by a lost journal; SQLite would replay them
            (self._run_dir / f"{JOURNAL_FILE}{suffix}").unlink(missing_ok=True)
        flush_folder(self._run_dir)
        failpoints.passing("mirror.restoring")
        draft.rename(self._run_dir / JOURNAL_FILE)
        flush_folder(self._run_dir)
        failpoints.passing("mirror.restored")

    def _claim(self, newest: int, check: Callable[[int, bytes], object]) -> tuple[_Copy, SegmentWriter]:
        """Apply every segment, and write the next. If another writer is faster, apply its segment first.

        Returns the complete draft and the writer of further segments.
        """
        self._apply_through(newest)
        for attempt in itertools.count(1):
            copy = self._copy
            if copy is None or self._last is None:
                raise RunDirectoryError(
                    f"{self._store.address} holds no complete copy of a run: its server was lost during the "
                    "first upload; to start a new run, set storage.mirror to an empty address"
                )
            if copy.problem:
                raise RunDirectoryError(copy.problem)
            facts = dict(copy.db.execute("SELECT key, value FROM run").fetchall())
            check(facts["seed"], facts["canonical"])
            writer = SegmentWriter(
                self._store, facts["run_id"], self._acknowledge, new_instance(), self._last.number,
                self._hash, lossless=self._lossless, lost=self._lost(copy),
            )  # fmt: skip
            writer.compose(NOTHING)
            failpoints.passing("mirror.claiming")
            found = writer.try_send()
            if found is None:
                failpoints.passing("mirror.claimed")
                return copy, writer
            self._apply(found)  # the other writer is alive, and wrote it first
            if attempt % _CATCH_UP == 0:
                self._apply_through(_newest(self._store))
        raise AssertionError

    def _apply_through(self, newest: int) -> None:
        """Apply the segments after the last applied one, up to and including `newest`."""
        first = self._last.number + 1 if self._last else 1
        names = [segment_name(number) for number in range(first, newest + 1)]
        for data in self._store.get_all(names):
            self._apply(data)

    def _apply(self, data: bytes | None) -> None:
        """Check the next segment, and apply its changes to the draft of its upload."""
        number = self._last.number + 1 if self._last else 1
        where = f"{self._store.address}/{segment_name(number)}"
        try:
            if data is None:
                raise ValueError("the segment is missing; restore it from a copy of the mirror")
            segment = Segment.decode(data)
            fits = (segment.number, segment.previous) == (number, self._hash)
            if not fits or (self._last and segment.run_id != self._last.run_id):
                raise ValueError("the segment does not continue the previous one; restore it from a copy")
            if segment.begins_upload:
                self._begin_upload(number)
            copy = self._unfinished or self._copy
            if segment.changes and copy is None:
                raise ValueError("the segment must follow an upload of the complete journal, but none began")
        except ValueError as error:
            raise RunDirectoryError(f"{where}: {error}") from error
        if segment.changes and copy is not None:
            try:
                copy.apply(segment)
            except (ValueError, sqlite3.IntegrityError) as error:
                copy.problem = f"{where}: {error}"  # ignored if a later upload is complete
            if copy is self._unfinished and segment.ends_upload:
                if self._copy is not None:
                    self._copy.discard()
                self._copy, self._unfinished = copy, None
        self._lossless = self._is_lossless(segment)
        self._last, self._hash = segment, hash_of(data)
        batches = [each.batches for each in (self._copy, self._unfinished) if each is not None]
        for gone in segment.deletes:
            found = [each.pop(gone, None) for each in batches]
            if not any(found):
                self._gone.append(gone)

    def _begin_upload(self, number: int) -> None:
        """Create a draft for the upload of the complete journal that begins with segment `number`."""
        if self._unfinished is not None:
            self._unfinished.discard()
        # The upload may lack the oldest batches, which earlier segments name.
        batches = dict(self._copy.batches) if self._copy is not None else {}
        self._unfinished = _Copy(self._run_dir / f"{_DRAFT}-{number}", batches)

    def _is_lossless(self, segment: Segment) -> bool:
        """The segment's `lossless` flag, or an inferred value if an older version wrote the segment."""
        if segment.lossless is not None:
            return segment.lossless
        if segment.acknowledge != "mirrored" or self._unfinished is not None:
            return False
        return self._lossless or bool(segment.changes)  # a segment without changes may be from a start

    def _insert_batches(self, copy: _Copy) -> None:
        """Insert the batches that the mirror has into a draft. Recovery fails if it needs a missing batch."""
        there = set(self._store.names(BATCHES))
        for name, batches in copy.batches.items():
            content = self._store.get(name) if name in there else None
            if content is None:
                log.warning("%s/%s is missing", self._store.address, name)
                continue
            found = split(batches, content)
            if found is None:
                log.warning("%s/%s does not match its hash and is not used", self._store.address, name)
                continue
            copy.db.executemany(
                "INSERT OR REPLACE INTO payloads VALUES (?, ?, ?)",
                [(batches.lineage, step, batch) for step, batch in found],
            )

    def _lost(self, copy: _Copy) -> tuple[int, ...]:
        """The steps after which acknowledged steps were lost, or may have been, by any restore so far."""
        assert self._last is not None
        earlier, (_, step) = self._last.lost, copy.step()
        return earlier if self._lossless or earlier[-1:] == (step,) else (*earlier, step)

    def _words(self, copy: _Copy) -> str:
        """Describe the point to which the run was restored, and what may have been lost."""
        (lineage, step), written = copy.step(), copy.written
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written.at))
        words = f"step {step} (lineage {lineage}), segment {written.number} of {at}"
        if self._unfinished is not None:
            words += "; a later upload of the complete journal was not finished and is not used"
        lost = self._lost(copy)
        earlier = lost if self._lossless else lost[:-1]
        if not self._lossless:
            words += f"; steps from {step + 1} on that were acknowledged after that are lost"
        elif earlier:
            words += "; no step acknowledged since the last restore is lost"
        else:
            words += "; no acknowledged step is lost"
        if earlier:
            words += (
                f"; earlier restores lost what was acknowledged after step {', '.join(map(str, earlier))}"
            )
        return words
