"""Saves checkpoints while training continues: one at a time, on a separate thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from maskwire_server.checkpoints import provenance
from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.config import CheckpointsConfig, ServeConfig
from maskwire_server.engine import admission_rules
from maskwire_server.engine.commits import CatalogueCommit, DropBatches
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Save
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.mirror import Mirror
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused
from maskwire_server.events import CheckpointWritten
from maskwire_server.journal import reserve
from maskwire_server.journal.journal import Journal
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SaveRequest
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)


class Saves:
    """Decides when a checkpoint is due, and owns the thread that writes, verifies and deletes checkpoints."""

    def __init__(
        self,
        run: Run,
        committer: Committer,
        catalogue: Catalogue,
        saver: Saver,
        settings: CheckpointsConfig,
        serve: ServeConfig,
        clock: Callable[[], float],
        mirror: Mirror | None = None,
    ) -> None:
        self._run = run
        self._committer = committer
        self._catalogue = catalogue
        self._saver = saver
        self._settings = settings
        self._drops_batches = serve.keep_payloads == "recovery"
        self._clock = clock
        self._mirror = mirror
        self._saved_at = clock()
        self._overdue = False
        self._before = self._saved_at, self._overdue
        self._written = threading.Condition(run.mutex)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="maskwire-saver")
        self._closing = False
        self.current: Save | None = None
        """The save whose snapshot is being made or written."""

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being made or written."""
        return self.current is not None

    @property
    def newest(self) -> CheckpointInfo | None:
        """The newest checkpoint of the run's own history; None if there is none."""
        return self._saver.newest

    # Under the mutex.

    def due(self, step: int) -> bool:
        """Whether to save an automatic checkpoint after `step`.

        While another checkpoint is being saved, returns False; the automatic checkpoint stays due.
        """
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        if every_steps is not None and step % every_steps == 0:
            self._overdue = True
        if every_seconds is not None and self._clock() - self._saved_at >= every_seconds:
            self._overdue = True
        return self._overdue and not self.busy

    def begin(self, save: Save) -> None:
        """Note that the snapshot of `save` is being made, and restart the interval of automatic saves."""
        self.current = save
        self._before = self._saved_at, self._overdue
        self._saved_at, self._overdue = self._clock(), False

    # Any thread.

    def join(self, request: SaveRequest, future: Future[CheckpointInfo]) -> bool:
        """Answer a repeated request, now or when its save is written. Returns False if the request is new.

        Raises Refused if the earlier request with this id had other arguments.
        """
        saved = self._saver.find(request)
        if saved is not None:
            self.answer_saved(saved, [future])
            return True
        with self._run.mutex:
            known = [*self._run.queue.saves(), *([self.current] if self.current else [])]
            for save in known:
                if request.request_id and save.request.request_id == request.request_id:
                    if save.request != request:
                        raise admission_rules.other_save(save.request)
                    save.waiters.append(future)
                    return True
        return False

    def start(self, save: Save, snapshot: Snapshot, position: HistoryPosition, save_id: str) -> None:
        """Queue a snapshot to be written. Its step must be durable, and its save recorded in the journal."""
        if self._closing:
            self.give_up(save, admission_rules.shutting_down())
        else:
            self._thread.submit(self._write, save, snapshot, position, save_id)

    def give_up(self, save: Save, refusal: Refused) -> None:
        """End a failed save, and refuse the callers that wait for it. Training continues."""
        if not save.automatic:  # an automatic save that was due before is still due
            saved_at, overdue = self._before
            self._saved_at, self._overdue = saved_at, overdue or self._overdue
        log.log(logging.INFO if refusal.reason == "WRONG_RUN" else logging.ERROR, "%s", refusal)
        self._end()
        for waiter in save.waiters:
            refuse(waiter, refusal)

    def wait_written(self) -> None:
        """Wait until no checkpoint is being written."""
        with self._run.mutex:
            self._written.wait_for(lambda: not self.busy)

    def delete(self, name: str, future: Future[None]) -> None:
        """Queue the deletion of a checkpoint. `future` is refused if the checkpoint is still needed."""
        self._thread.submit(self._delete, name, future)

    def end(self) -> None:
        """From now on, refuse saves instead of writing their snapshots."""
        self._closing = True

    def close(self) -> None:
        """Finish the checkpoint that is being written, and end the thread."""
        self._thread.shutdown(wait=True)

    # The saver's thread.

    def _write(self, save: Save, snapshot: Snapshot, position: HistoryPosition, save_id: str) -> None:
        lineages, began = self._run.lineages, self._clock()
        try:
            info = self._saver.write(save.request, save.automatic, snapshot, position, save_id, lineages)
        except Exception as error:
            # Without its traceback, whose frames refer to the snapshot and would keep it in memory.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            with self._run.mutex:
                refusal = self._run.conditions.failed("the checkpoint", error)
            self.give_up(save, refusal)
            return
        try:
            self._collect()
        except Exception as error:  # the checkpoint is saved; the next save tries again
            with self._run.mutex:
                self._run.conditions.failed("collecting checkpoints", error)
        self._run.events.publish(
            CheckpointWritten(
                time.time(),
                info.name,
                info.lineage,
                info.step,
                info.size_bytes,
                self._clock() - began,
                save.automatic,
            )
        )
        self._end()
        self.answer_saved(info, save.waiters)

    def answer_saved(self, info: CheckpointInfo, waiters: list[Future[CheckpointInfo]]) -> None:
        """Answer the callers that wait for a saved checkpoint. Can be called from any thread.

        If they also wait for the mirror, they are answered once the mirror has the checkpoint.
        """
        if self._mirror is not None:
            self._mirror.answer_saved(info, waiters)
            self._mirror.saved()
            return
        for waiter in waiters:
            answer(waiter, info)

    def _collect(self) -> None:
        """Delete unneeded checkpoints and batches, after verifying the checkpoints that a restart needs."""
        with self._run.mutex:
            lineages, lineage = self._run.lineages, self._run.head.computed.lineage
        gone = self._saver.collect(lineages, lineage)
        self._record_catalogue()
        if gone and self._drops_batches:
            self._committer.append(DropBatches(gone, self._committer.append))

    def _record_catalogue(self) -> None:
        if not self._catalogue.is_recorded:
            self._committer.append(CatalogueCommit(self._catalogue))

    def _end(self) -> None:
        with self._run.mutex:
            self.current = None
            self._run.queue.unpark()
            self._run.work.set()
            self._written.notify_all()

    def _delete(self, name: str, future: Future[None]) -> None:
        try:
            self._saver.delete(name, self._run.lineages, self._run.head.computed.lineage)
        except Exception as error:
            with self._run.mutex:
                failed = self._run.conditions.failed(f"the deletion of checkpoint {name!r}", error)
            refuse(future, failed)
        else:
            answer(future, None)
        finally:
            self._saver.refresh()
            self._record_catalogue()
            if self._mirror is not None:
                self._mirror.saved()


@dataclass(eq=False)
class SaveCommit:
    """A snapshot of a computed step: it is written as a checkpoint once that step is durable."""

    saves: Saves
    journal: Journal
    save: Save
    snapshot: Snapshot
    position: HistoryPosition
    save_id: str
    flush: bool
    """Whether the journal must be flushed first: with `durability = "off"`, commits are not flushed."""

    def write(self, journal: Journal) -> None:
        """Record the id of the save in the journal."""
        provenance.record_save(journal, self.position, self.save_id)

    def committed(self) -> None:
        """Flush the journal if needed, then write the checkpoint.

        After a power loss, the checkpoint must not be ahead of the journal.
        """
        if self.flush and not reserve.merge_log(self.journal):
            full = "the journal's disk is full; free some space, and save again"
            self.saves.give_up(self.save, Refused("CHECKPOINT_FAILED", full))
            return
        self.saves.start(self.save, self.snapshot, self.position, self.save_id)
