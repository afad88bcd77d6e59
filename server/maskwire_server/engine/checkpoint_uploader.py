"""The thread that uploads checkpoints to the mirror, and deletes objects there that nothing needs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from maskwire_server.checkpoints.mirrored_checkpoints import MirroredCheckpoints
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.wakeup import Wakeup
from maskwire_server.errors import Refused, StoreError
from maskwire_server.manifest import Manifest
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0


class CheckpointUploader:
    """Uploads each checkpoint to the mirror, after the journal's records of the steps before it."""

    def __init__(
        self,
        run: Run,
        copies: MirroredCheckpoints,
        announced: Wakeup,
        *,
        drops_batches: bool,
        waits: bool,
    ) -> None:
        """`announced` is set if a segment should announce deletions; `waits` if saves wait for the upload."""
        self._run = run
        self._copies = copies
        self._announcing = announced
        self._drops_batches = drops_batches
        self._waits = waits
        self._work = Wakeup()
        self._progress = threading.Condition()
        self._through = 0  # the mark of the outbox up to which the mirror has all changes
        self._announcements: list[str] = []
        self._deletions: list[str] = []
        self._waiters: list[tuple[CheckpointInfo, Future[CheckpointInfo]]] = []
        self._stopping = False
        self._looking = True  # a checkpoint was saved or deleted here since the thread last looked
        self._busy = False
        self._committer: Committer
        self.problem = ""
        """Why the last upload failed, or which checkpoint is too damaged to upload; empty if neither."""
        self.failures = 0
        self.thread = threading.Thread(target=self._main, name="maskwire-mirror-checkpoints", daemon=True)

    # Any thread.

    def start(self, committer: Committer) -> None:
        """Start the thread, which uploads the checkpoints."""
        self._committer = committer
        self.thread.start()

    def look(self) -> None:
        """Note that a checkpoint was saved or deleted in the run directory."""
        self._looking = True
        self._work.set()

    def answer(self, info: CheckpointInfo, waiters: list[Future[CheckpointInfo]]) -> None:
        """Answer the callers that saved a checkpoint, after the upload if answers wait for the mirror."""
        if self._waits and not self._copies.holds(info):
            with self._progress:
                self._waiters += [(info, waiter) for waiter in waiters]
            self.look()
            return
        for waiter in waiters:
            answer(waiter, info)

    @property
    def idle(self) -> bool:
        """Whether no checkpoint of the run directory is left to upload."""
        return not (self._looking or self._busy)

    @property
    def announcing(self) -> bool:
        """Whether there are deletions that the next segment should announce."""
        return bool(self._announcements)

    def take_announcements(self) -> list[str]:
        """Remove and return the names of the objects whose deletion the next segment announces."""
        with self._progress:
            taken, self._announcements = self._announcements, []
        return taken

    def mirrored(self, through: int) -> None:
        """Note that the mirror has all changes of the journal up to the outbox mark `through`."""
        with self._progress:
            self._through = through
            self._progress.notify_all()

    def announced(self, names: Sequence[str]) -> None:
        """Queue the deletion of objects that a segment has announced. No other server relies on them now."""
        if names:
            with self._progress:
                self._deletions += names
            self._work.set()

    def upload(self, name: str) -> None:
        """Upload a checkpoint now, if the run directory has it and it is intact. Raises StoreError."""
        for manifest in self._copies.missing():
            if manifest.info.name == name:
                self._upload(manifest)

    def stop(self) -> None:
        """Make the thread end."""
        with self._progress:
            self._stopping = True
            self._progress.notify_all()
        self._work.set()

    # The thread.

    def _main(self) -> None:
        failing = False
        try:
            while not self._stopping:
                try:
                    self.problem, failing = self._copy(), False
                except (StoreError, OSError) as error:
                    self.failures += 1
                    if not failing:
                        log.error("checkpoints cannot be copied to the mirror now: %s; trying again", error)
                    self.problem, failing = str(error), True
                self._work.wait(RETRY_SECONDS if failing else None)
        except Refused:  # the committer has ended
            pass
        except Exception:
            log.exception("checkpoints are not uploaded any more; restart the server")
            self.problem = "the thread that uploads checkpoints failed; see the log"

    def _copy(self) -> str:
        """Delete announced objects, upload missing checkpoints, and announce objects to delete next.

        Returns why a checkpoint of the run directory cannot be uploaded; empty if all were uploaded.
        """
        self._busy = True
        self._looking = False
        self._delete()
        problem = ""
        for manifest in self._copies.missing():
            self._wait_mirrored()
            problem = self._upload(manifest) or problem
            self._answer_waiters()
        self._answer_waiters()
        with self._run.mutex:
            lineages, lineage = self._run.lineages, self._run.head.computed.lineage
        self._wait_mirrored()  # the mirror must have the lineages from which the deletions follow
        gone = self._copies.collectable(lineages, lineage, batches=self._drops_batches)
        with self._progress:
            new = [name for name in gone if name not in self._deletions]
            self._announcements = new
        if new:
            self._announcing.set()
        self._busy = False
        return problem

    def _upload(self, manifest: Manifest) -> str:
        """Upload a checkpoint. If it is damaged, refuse the callers that saved it, and return the problem."""
        name = manifest.info.name
        try:
            self._copies.upload(manifest)
        except Refused as refusal:
            problem = f"checkpoint {name!r} cannot be copied to the mirror: {refusal}"
            log.warning("%s", problem)
            if manifest in self._copies.missing():  # otherwise it was deleted: see `_answer_waiters`
                for _, waiter in self._take_waiters(lambda info: info == manifest.info):
                    refuse(waiter, Refused("CHECKPOINT_FAILED", problem, name=name))
                return problem
        return ""

    def _wait_mirrored(self) -> None:
        """Wait until the mirror has every record that the journal has now. Raises Refused at shutdown."""
        position = self._committer.position
        with self._progress:
            self._progress.wait_for(lambda: self._through >= position or self._stopping)
        if self._stopping:
            raise Refused("DRAINING", "the server is shutting down; retry when it has restarted")

    def _delete(self) -> None:
        while True:
            with self._progress:
                name = self._deletions[0] if self._deletions else None
            if name is None:
                return
            self._copies.delete([name])
            with self._progress:
                self._deletions.remove(name)

    def _answer_waiters(self) -> None:
        """Answer callers whose checkpoint is in the mirror, and refuse callers whose checkpoint is gone."""
        with self._progress:  # so that no caller is added whose checkpoint was saved after this list was made
            missing = [manifest.info for manifest in self._copies.missing()]
            waiters = self._take_waiters(lambda info: info not in missing)
        for info, waiter in waiters:
            if self._copies.holds(info):
                answer(waiter, info)
            else:
                gone = f"checkpoint {info.name!r} was deleted before it was in the mirror; save again"
                refuse(waiter, Refused("CHECKPOINT_FAILED", gone, name=info.name))

    def _take_waiters(
        self, chosen: Callable[[CheckpointInfo], bool]
    ) -> list[tuple[CheckpointInfo, Future[CheckpointInfo]]]:
        """Remove and return the waiting callers for whose checkpoint `chosen` returns True."""
        with self._progress:
            taken = [each for each in self._waiters if chosen(each[0])]
            self._waiters = [each for each in self._waiters if not chosen(each[0])]
        return taken
