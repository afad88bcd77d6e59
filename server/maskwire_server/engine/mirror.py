"""The mirror of a run in an object store, while the run starts and while it is served.

Of its two threads, one uploads the journal's changes as segments, and the other uploads checkpoints. No step
waits for them, unless `acknowledge = "mirrored"`: then the committer holds back each answer until the records
that it reports are in a segment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from maskwire.v1.values import MirrorStatus
from maskwire_server import failpoints
from maskwire_server.checkpoints.mirrored_checkpoints import MirroredCheckpoints, members
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import StorageConfig
from maskwire_server.engine.checkpoint_uploader import CheckpointUploader
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.engine_options import EngineOptions
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.uploaded_commit import UploadedCommit
from maskwire_server.engine.wakeup import Wakeup
from maskwire_server.errors import FencedError, Refused, StoreError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import ancestry
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import SegmentWriter, resume
from maskwire_server.journal.mirror_segments import Segment, restored_checkpoints
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.outbox import Page
from maskwire_server.recovery import initial_weights
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)

START_RETRY_SECONDS = 1.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 10.0
"""The wait after a failure, which doubles with each further one, and its upper bound."""
STOP_ATTEMPTS = 3
"""Failed uploads in a row after which a stopping server gives up, if the store worked before the stop."""


class Mirror:
    """The mirror of one run. `attach` and `settle` are for the thread that starts the run."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        settings: StorageConfig,
        store: ObjectStore,
        *,
        drops_batches: bool,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._copies = MirroredCheckpoints(store, checkpoints)
        self._on_fatal = on_fatal
        self._work = Wakeup()
        self._stopping = False
        self._saves = CheckpointUploader(
            run, self._copies, self._work, drops_batches=drops_batches, waits=self.awaited
        )
        self._writer: SegmentWriter
        self._committer: Committer
        self._thread = threading.Thread(target=self._main, name="maskwire-mirror", daemon=True)
        self._sent = 0  # the newest mark of the outbox that is in the mirror
        self._unrecorded: UploadedCommit | None = None  # a segment of `settle` that the journal does not know
        self._step = (0, 0)
        self._restored = ""
        self._at = time.time()
        self._problem = ""
        self._bytes = self._failures = 0

    @property
    def awaited(self) -> bool:
        """Whether answers wait for the mirror."""
        return self._settings.acknowledge == "mirrored"

    # The start.

    def attach(self, journal: Journal, tell: Callable[[str], None]) -> None:
        """Become the writer of the run's mirror, and fetch the checkpoints that a restored run lacks.

        Waits until the store answers. Raises FencedError, RunDirectoryError, ConfigError.
        """
        self._store.patience = partial(self._wait, tell)
        self._store.probe()
        self._writer = resume(journal, self._store, self._settings.acknowledge)
        state = journal.outbox.state()
        if state is not None and state.fetching:
            tell("checkpoints from the mirror")
            self._copies.fetch(journal, state.gone)
            journal.transaction(partial(journal.outbox.keep, replace(state, fetching=False, gone=())))
        found = {folder: manifest for folder, (manifest, _) in self._copies.read_all().items()}
        self._copies.load(members(journal, found))
        self._restored = state.restored if state else ""
        self._step, self._at = journal.outbox.last_uploaded_step(), time.time()
        self._problem = ""  # the store answers again

    def settle(self, journal: Journal) -> None:
        """Upload what must be in the mirror before this server computes a step or answers a client.

        The newest checkpoint is uploaded if the mirror has none from which the run can be recovered. If
        answers wait for the mirror, every record of the journal is uploaded too. The method can be called
        again if the disk was full.
        """
        if (self.awaited and self._copies.newest is None) or self._lacks_checkpoint(journal):
            self._copies.upload_newest(journal.lineages())
        while self.awaited:
            if self._unrecorded is None:
                page = journal.outbox.page(0, self._settings.segment_bytes)
                if not page.last and self._writer.lossless:
                    break
                for name in restored_checkpoints(page.changes):
                    self._saves.upload(name)
                self._writer.lossless |= not page.more
                self._writer.compose(page)
                self._send()
                self._sent = max(self._sent, page.last)
                self._unrecorded = UploadedCommit(self._writer, page.last)
            journal.transaction(partial(self._unrecorded.write, journal))
            self._unrecorded = None
        self._step = journal.outbox.last_uploaded_step()
        self._problem = ""

    def _lacks_checkpoint(self, journal: Journal) -> bool:
        """Whether recovery from the mirror needs a checkpoint that the mirror lacks.

        Such a checkpoint is needed if the journal lacks batches, if the initial weights do not come from the
        seed, or if there was an inexact replay, which another machine cannot repeat.
        """
        lineages = journal.lineages()
        segments = ancestry(lineages, max(lineages))
        newest = self._copies.newest_of(segments)
        start = (0, 0) if newest is None else (newest.info.lineage, newest.info.step)
        return (
            journal.outbox.needs_checkpoint()
            or (newest is None and not initial_weights.come_from_seed(journal))
            or bool(inexact_replays.ahead(inexact_replays.recorded(journal), segments, start))
        )

    def _wait(self, tell: Callable[[str], None], failure: StoreError) -> bool:
        """Wait before a call to the store is retried. Return False if the server is stopping."""
        self._note(failure)
        tell(f"the mirror: {failure}")
        self._work.wait(START_RETRY_SECONDS)
        return not self._stopping

    # Any thread.

    def start(self, committer: Committer) -> None:
        """Start the two threads, which upload the journal's changes and the checkpoints."""
        self._committer = committer
        self._problem = ""
        self._store.patience = _no_patience
        if self.awaited:
            committer.on_written = self._work.set
        self._saves.start(committer)
        self._thread.start()

    def saved(self) -> None:
        """Note that a checkpoint was saved or deleted in the run directory."""
        self._saves.look()

    def answer_saved(self, info: CheckpointInfo, waiters: list[Future[CheckpointInfo]]) -> None:
        """Answer the callers that saved this checkpoint, as soon as the settings allow."""
        self._saves.answer(info, waiters)

    def shows(self, info: CheckpointInfo) -> bool:
        """Whether clients may see a checkpoint."""
        return not self.awaited or self._copies.holds(info)

    def newest_shown(self, here: CheckpointInfo | None) -> CheckpointInfo | None:
        """The newest checkpoint that clients may see; `here` is the newest one of the run directory."""
        if here is None or self.shows(here):
            return here
        copied = self._copies.newest
        return None if copied is None else copied.info

    def flush(self, seconds: float) -> None:
        """Wait until everything is uploaded or uploads keep failing, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        attempts = 1 if self._problem or self._saves.problem else STOP_ATTEMPTS
        failures, sent = self._all_failures, self._sent
        self._saves.look()
        self._work.set()
        while time.monotonic() < deadline and self._thread.is_alive():
            if self._sent > sent:
                failures, sent = self._all_failures, self._sent
            saved = self._saves.idle or not self._saves.thread.is_alive()
            if saved and self._committer.position <= self._sent:
                return
            if self._all_failures - failures >= attempts:
                return
            if not self._problem:  # otherwise the thread waits until it tries again
                self._work.set()
            time.sleep(0.02)

    @property
    def _all_failures(self) -> int:
        return self._failures + self._saves.failures

    def status(self) -> MirrorStatus:
        """Report how much of the run is in the mirror. Takes no lock."""
        newest = self._copies.newest
        writer = getattr(self, "_writer", None)
        return MirrorStatus(
            self._store.address,
            self._settings.acknowledge,
            *self._step,
            segment=writer.number if writer else 0,
            seconds_since_segment=max(0.0, time.time() - self._at),
            checkpoint=newest.info.name if newest else "",
            problem=self._problem or self._saves.problem,
            restored=self._restored,
            uploaded_bytes=self._bytes,
            failures=self._all_failures,
        )

    def stop(self) -> None:
        """Stop waiting for the store, and let the threads end."""
        self._stopping = True
        self._saves.stop()
        self._work.set()

    def close(self) -> None:
        """End the threads. A thread whose call to the store hangs is left running."""
        self.stop()
        for thread in (self._thread, self._saves.thread):
            if thread.ident is not None:
                thread.join(1.0)

    # The thread that uploads segments.

    def _main(self) -> None:
        seconds = RETRY_SECONDS
        try:
            while not self._stopping:
                try:
                    more = self._upload()
                except (StoreError, OSError) as error:
                    self._note(error)
                    self._committer.mirror_failed(f"the mirror: {self._problem}")
                    self._work.wait(seconds)
                    seconds = min(2 * seconds, LONGEST_RETRY_SECONDS)
                    continue
                seconds = RETRY_SECONDS
                if not more:
                    self._work.wait(None if self.awaited else self._settings.segment_seconds)
        except BaseException as error:
            log.critical("the mirror failed: the server exits", exc_info=not isinstance(error, FencedError))
            self._on_fatal(error)

    def _upload(self) -> bool:
        """Upload one segment if there are changes, and return whether more changes are left."""
        more = False
        if self._writer.pending is None:
            page = self._next_page()
            if page is None:
                return False
            if not page.last and not self._saves.announcing:
                self._advance(page.position)
                return False
            for name in restored_checkpoints(page.changes):
                self._saves.upload(name)  # first: the lineage needs the checkpoint it starts from
            self._writer.compose(page, self._saves.take_announcements())
            more = page.more
        segment = self._send()
        steps = [change.values[:2] for change in segment.changes if change.table == "steps"]
        if steps:
            self._step = max((int(str(lineage)), int(str(step))) for lineage, step in steps)
        self._advance(segment.last)
        failpoints.passing("mirror.acknowledging")
        self._committer.append(UploadedCommit(self._writer, self._sent))
        self._saves.announced(segment.deletes)
        return more

    def _send(self) -> Segment:
        """Upload and return the composed segment. Raises FencedError, or StoreError if a retry can help."""
        segment = self._writer.pending
        assert segment is not None
        self._writer.send()
        self._at = segment.at
        self._bytes += sum(size for batches in segment.batches for _, size in batches.steps)
        return segment

    def _next_page(self) -> Page | None:
        """Return the next changes that the mirror lacks; None during shutdown. Raises StoreError."""
        try:
            size = self._settings.segment_bytes
            return self._committer.ask_unmirrored(_page, self._sent, size).result()
        except Refused as refusal:
            if refusal.reason == "DRAINING":
                return None
            raise StoreError(f"the journal cannot be read for the mirror: {refusal}") from refusal

    def _advance(self, mark: int) -> None:
        """Note that the mirror has all changes of the journal up to this mark of the outbox."""
        if self._problem:
            log.warning("the mirror at %s can be written again", self._store.address)
        self._problem = ""
        self._sent = max(self._sent, mark)
        self._committer.mirrored_through(self._sent)
        self._saves.mirrored(self._sent)

    def _note(self, error: BaseException) -> None:
        self._failures += 1
        if not self._problem:
            log.error("the mirror cannot be written now: %s; trying again", error)
        self._problem = str(error)


def mirror_of(
    options: EngineOptions, run: Run, checkpoints: Checkpoints, on_fatal: Callable[[BaseException], None]
) -> Mirror | None:
    """Return the mirror that the settings name, or None."""
    if options.store is None:
        return None
    drops_batches = options.serve.keep_payloads == "recovery"
    return Mirror(
        run, checkpoints, options.storage, options.store, drops_batches=drops_batches, on_fatal=on_fatal
    )


def _no_patience(_: StoreError) -> bool:
    return False  # the threads themselves wait, and report the failure


def _page(journal: Journal, after: int, size: int) -> Page:
    return journal.outbox.page(after, size)
