"""The writer of a run's mirror segments. It owns the run until another writer writes the next segment."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from maskwire_server import failpoints
from maskwire_server.errors import FencedError, RunDirectoryError, StoreError
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segments import Segment, batch_object, hash_of, segment_name
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.outbox import MirrorState, Page
from maskwire_server.journal.schema import FORMAT

log = logging.getLogger(__name__)

NOTHING = Page((), 0, 0, {}, more=False)


class SegmentWriter:
    """Writes the segments of a run's mirror, one after another. Used by one thread at a time."""

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        acknowledge: str,
        instance: str,
        number: int,
        previous: str,
        *,
        lossless: bool = False,
        lost: tuple[int, ...] = (),
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._acknowledge = acknowledge
        self.instance = instance
        self.number = number
        """The number of the newest segment."""
        self.hash = previous
        """The SHA-256 of the newest segment; empty before the first."""
        self.lossless = lossless
        """The value of `Segment.lossless` for the next segment."""
        self._lost = lost
        self.pending: Segment | None = None
        """The segment that is composed but not uploaded yet. A retry must send the same bytes."""
        self._data = b""
        self._objects: list[tuple[str, bytes]] = []

    def compose(self, page: Page, deletes: Sequence[str] = ()) -> None:
        """Compose the next segment from a page of changes and the names of objects to delete."""
        number = self.number + 1
        objects = [batch_object(number, lineage, batches) for lineage, batches in page.batches.items()]
        self.pending = Segment(
            self._run_id, number, self.hash, self.instance, time.time(), self._acknowledge, FORMAT,
            page.first, page.last, page.changes, tuple(batches for batches, _ in objects), tuple(deletes),
            self.lossless, self._lost,
        )  # fmt: skip
        self._objects = [(batches.name, content) for batches, content in objects]
        self._data = self.pending.encode()

    def send(self) -> None:
        """Upload the composed segment, its batches first.

        Raises FencedError if another writer's segment has its number, and StoreError if a retry can help.
        """
        assert self.pending is not None
        number = self.pending.number
        found = self.try_send()
        if found is not None:
            raise fenced(self._store, found, number)

    def try_send(self) -> bytes | None:
        """Like `send`, but return another writer's segment with this number instead of raising FencedError.

        Returns None if the segment was uploaded.
        """
        assert self.pending is not None
        failpoints.passing("mirror.uploading")
        while self._objects:
            self._store.put(*self._objects[-1])
            self._objects.pop()
        failpoints.passing("mirror.batches_uploaded")
        name = segment_name(self.pending.number)
        try:
            self._store.create(name, self._data)
        except FileExistsError:
            found = self._store.get(name)
            if found is None:
                raise StoreError(f"{self._store.address}: {name} exists but cannot be read; retry") from None
            if found != self._data:  # otherwise an earlier attempt succeeded, and its answer was lost
                return found
        failpoints.passing("mirror.segment_uploaded")
        self.number, self.hash = self.pending.number, hash_of(self._data)
        self.pending, self._data = None, b""
        return None


def new_instance() -> str:
    """A new random name that identifies a server process."""
    return uuid.uuid4().hex


def fenced(store: ObjectStore, found: bytes, number: int) -> FencedError:
    """The error to raise if another writer's segment, `found`, already has the number `number`."""
    try:
        writer = Segment.decode(found).instance
    except ValueError:
        writer = "unknown"
    return FencedError(
        f"{store.address}: another server (instance {writer}) wrote segment {number}: it has taken the run "
        "over, and this run directory must not be served any more. If that is a mistake, stop the other "
        "server and start this one with an empty run directory: it restores the run from the mirror"
    )


def resume(journal: Journal, store: ObjectStore, acknowledge: str) -> SegmentWriter:
    """Make this process the writer of the run's segments, by writing an empty segment.

    Raises FencedError if another server has taken the run over, and RunDirectoryError if the address holds
    another run.
    """
    outbox = journal.outbox
    known = outbox.state()
    if known is None or known.address != store.address:
        before = known or MirrorState("")
        known = MirrorState(store.address, restored=before.restored, lost=before.lost)
    chain = _Chain(journal, store, known)
    writer = _claim(chain, journal, store, acknowledge)
    if not (chain.state.complete and outbox.is_current and chain.state.journal_format == FORMAT):
        log.info("the whole journal will be uploaded to %s", store.address)
        outbox.fill(chain.state, journal.transaction)
    return writer


def _claim(chain: _Chain, journal: Journal, store: ObjectStore, acknowledge: str) -> SegmentWriter:
    """Write an empty segment as the next one, and record it. Raises FencedError if the run was taken over."""
    outbox, instance = journal.outbox, new_instance()
    while True:
        chain.read()
        # Without an outbox, the run was served without a mirror. Record this before creating the outbox.
        unmirrored = chain.state.unmirrored or not outbox.active
        # The instance is recorded first: if this start is killed after the upload, the next one recognises
        # the segment.
        instances = tuple(dict.fromkeys((*chain.state.instances, instance)))
        chain.state = state = replace(chain.state, unmirrored=unmirrored, instances=instances)
        journal.transaction(partial(outbox.keep, state))
        # This segment has no changes, so it can be lossless only if the previous segment was.
        lossless = acknowledge == "mirrored" and chain.lossless and not unmirrored
        writer = SegmentWriter(
            store, journal.fact("run_id"), acknowledge, instance, state.number, state.hash,
            lossless=lossless, lost=state.lost,
        )  # fmt: skip
        writer.compose(NOTHING)
        failpoints.passing("mirror.claiming")
        if writer.try_send() is None:
            break
        # Another server, or an earlier process of this directory, wrote a segment meanwhile: read it.
    failpoints.passing("mirror.claimed")
    chain.state = replace(
        state, number=writer.number, hash=writer.hash, instances=(instance,), unmirrored=False
    )
    journal.transaction(partial(outbox.keep, chain.state))
    return writer


class _Chain:
    """The segments in the mirror after the last one that the journal has recorded."""

    def __init__(self, journal: Journal, store: ObjectStore, state: MirrorState) -> None:
        self._journal = journal
        self._store = store
        self.state = state
        self.lossless = False
        """The value of `lossless` in the last segment."""

    def read(self) -> None:
        """Record the segments that an earlier process of this run directory uploaded but did not record."""
        while True:
            number = self.state.number + 1
            data = self._store.get(segment_name(number))
            if data is None:
                self._require_last()
                return
            segment = self._decoded(number, data)
            if not self.state.number and not self.state.instances:
                raise RunDirectoryError(
                    f"{self._store.address} holds run {segment.run_id}: to restore it, start with an empty "
                    "run directory; to mirror this run, set storage.mirror to an address of its own"
                )
            mine = segment.instance in self.state.instances and segment.previous == self.state.hash
            if not (mine and self._holds(segment)):
                raise fenced(self._store, data, number)
            self.state = replace(self.state, number=number, hash=hash_of(data))
            self._journal.transaction(partial(self._journal.outbox.uploaded, segment.last, self.state))
            log.info("segment %d was uploaded before the server ended", number)

    def _holds(self, segment: Segment) -> bool:
        """Whether the segment's changes are in the outbox, so that they come from this run directory."""
        if not segment.changes:
            return True
        outbox = self._journal.outbox
        return outbox.active and outbox.holds(segment.first, segment.last, segment.changes)

    def _require_last(self) -> None:
        """Raise RunDirectoryError unless the last recorded segment is in the mirror, unchanged."""
        if self.state.number:
            data = self._store.get(segment_name(self.state.number))
            if data is None or hash_of(data) != self.state.hash:
                raise RunDirectoryError(
                    f"{self._store.address}: segment {self.state.number}, which this run wrote, is missing "
                    "or was changed: restore this object, or set storage.mirror to another address, to which "
                    "the run will be uploaded again"
                )
            self.lossless = bool(self._decoded(self.state.number, data).lossless)

    def _decoded(self, number: int, data: bytes) -> Segment:
        try:
            return Segment.decode(data)
        except ValueError as error:
            raise RunDirectoryError(f"{self._store.address}: segment {number}: {error}") from error
