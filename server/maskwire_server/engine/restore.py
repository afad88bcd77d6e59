"""The RestoreCheckpoint call: the run returns to a checkpoint, and continues on a new lineage."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

from maskwire.v1.digest import lineage_digest
from maskwire.v1.values import RestoreResult, RunState
from maskwire_server import failpoints
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine import admission_rules
from maskwire_server.engine.commits import LineageCommit
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Restore, Save
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.trainer_interface import Trainer, guarded
from maskwire_server.errors import Refused
from maskwire_server.events import LineageOpened
from maskwire_server.journal.records import Lineage, SessionRecord
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import RestoreRequest, SaveRequest

log = logging.getLogger(__name__)

_RESTORED = "the run was restored to it"
WAIT_SECONDS = 0.1
"""How often a restore that waits for the mirror checks for a shutdown."""


@dataclass
class Restores:
    """Restores checkpoints. Callers' threads call `begin`; the executor's thread calls `restore`."""

    run: Run
    committer: Committer
    checkpoints: Checkpoints
    trainer: Trainer
    stopping: bool = False
    """Whether the engine is being closed: a restore then does not wait for the mirror."""

    def begin(self, request: RestoreRequest, future: Future[RestoreResult]) -> None:
        """Verify the checkpoint on another thread, then queue the restore. Raises Refused.

        A request whose id has already restored this checkpoint gets the recorded answer.
        """
        with self.run.mutex:
            admission_rules.refuse_unavailable(self.run.conditions.state)
            if self._answer_again(request, future):
                return
            self.run.conditions.set(RunState.RESTORING, waiting_for="the checkpoint's files to be read")
        try:
            restore = Restore(request, self.checkpoints.pin(request.name, _RESTORED), future)
        except BaseException:
            with self.run.mutex:
                self.run.conditions.set(RunState.RESTORING, False)
            raise
        with self.run.mutex:
            self.run.queue.interrupt(
                Refused("RESTORING", "a checkpoint is being restored; retry with the same request id")
            )
        thread = threading.Thread(target=self._examine, args=(restore,), name="maskwire-restore", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads can be started
            with self.run.mutex:
                refusal = self.run.conditions.failed("the restore", error)
            self._give_up(restore, refusal)

    def _answer_again(self, request: RestoreRequest, future: Future[RestoreResult]) -> bool:
        """Answer a request whose id has restored a checkpoint before. Returns whether it was answered.

        Called under the mutex. Raises Refused if the id restored another checkpoint.
        """
        for lineage in self.run.lineages.values():
            if request.request_id is None or lineage.request_id != request.request_id:
                continue
            if lineage.checkpoint != request.name:
                raise Refused(
                    "PAYLOAD_MISMATCH",
                    f"this request id has already restored checkpoint {lineage.checkpoint!r}; use a new "
                    "request id to restore another checkpoint",
                    name=lineage.checkpoint,
                )
            answer(future, RestoreResult(lineage.lineage, lineage.step, lineage.digest))
            return True
        return False

    def _examine(self, restore: Restore) -> None:
        """Verify the checkpoint's files, then queue the restore or refuse it. Runs on its own thread."""
        name = restore.manifest.info.name
        try:
            self._require_intact(restore)
        except Exception as error:
            with self.run.mutex:
                refusal = self.run.conditions.failed(f"reading checkpoint {name!r}", error)
            self._give_up(restore, refusal)
            return
        with self.run.mutex:
            draining = self.run.conditions.holds(RunState.DRAINING)
            if not draining:
                self.run.conditions.set(RunState.RESTORING, waiting_for="the running step")
                self.run.queue.push_ahead(restore)
                self.run.work.set()
        if draining:
            self._give_up(restore, admission_rules.shutting_down())

    def _require_intact(self, restore: Restore) -> None:
        """Read and hash the checkpoint's files. Raises Refused if they were changed or removed."""
        name = restore.manifest.info.name
        problem = self.checkpoints.damage(restore.manifest)
        if problem is not None:
            raise Refused(
                "CHECKPOINT_DAMAGED",
                f"checkpoint {name!r} cannot be restored: {problem}; restore another checkpoint",
                name=name,
                problem=problem,
            )

    def _give_up(self, restore: Restore, refusal: Refused) -> None:
        self.checkpoints.unpin(restore.manifest.info.name, _RESTORED)
        with self.run.mutex:
            self.run.conditions.set(RunState.RESTORING, False)
        refuse(restore.future, refusal)

    def restore(self, restore: Restore) -> None:
        """Record the new lineage once all computed steps are durable, then load the checkpoint."""
        info, here = restore.manifest.info, self.run.head.computed
        try:
            admission_rules.refuse_unexpected(restore.request, here)
            if not self.committer.wait_durable() or self.run.conditions.holds(RunState.HELD):
                admission_rules.refuse_unavailable(RunState.HELD)
            self._require_intact(restore)  # again: the restore may have waited for long
            number = here.lineage + 1
            lineage = Lineage(
                number,
                info.lineage,
                info.step,
                lineage_digest(info.digest, number),
                restore.request.request_id,
                info.name,
            )
            session, acknowledged = self._record(lineage)
        except Refused as refusal:
            self._give_up(restore, refusal)
            return
        failpoints.passing("restore.recorded")
        # From here on, memory must match the journal: a failure ends the process, and a restart
        # recovers the new lineage.
        with self.run.mutex:
            self._move(restore.manifest, lineage, session)
        with guarded(self.trainer):
            self.trainer.load(self.checkpoints.path(info.name))
        failpoints.passing("restore.loaded")
        restored = RestoreResult(number, info.step, lineage.digest)
        self.run.events.publish(LineageOpened(time.time(), here.run_id, number, info.step))
        log.info("restored checkpoint %s: lineage %d from step %d", info.name, number, info.step)
        with self.run.mutex:
            # Earlier batches may have been dropped: save a second checkpoint, in case the first is damaged.
            if not self.run.conditions.holds(RunState.DRAINING):  # a drain saves a checkpoint itself
                self.run.queue.push_first(Save(SaveRequest(), automatic=True))
            self.run.conditions.set(RunState.RESTORING, False)
        if acknowledged:
            answer(restore.future, restored)
        else:
            refuse(restore.future, admission_rules.shutting_down())

    def _record(self, lineage: Lineage) -> tuple[SessionRecord, bool]:
        """Make the lineage durable. If the disk is full, raises Refused and changes nothing.

        Returns the record of the new epoch, and whether to acknowledge the restore. The restore is not
        acknowledged if its answer waits for the mirror, and the process shuts down before the mirror has the
        lineage.
        """
        # Advance the epoch, which fences the writer of the old lineage.
        session = SessionRecord(
            self.run.lease.epoch + 1, "restore", None, False, lineage.lineage, lineage.step, True
        )
        recorded: Future[None] = Future()
        commit = LineageCommit(recorded, None, lineage, session)
        self.committer.append(commit)
        if not self.committer.wait_durable() and self.committer.withdraw(commit):
            admission_rules.refuse_unavailable(RunState.HELD)
        while True:
            try:
                recorded.result(WAIT_SECONDS)
            except TimeoutError:
                if not (self.stopping or self.run.conditions.holds(RunState.DRAINING)):
                    continue
            return session, recorded.done()

    def _move(self, manifest: Manifest, lineage: Lineage, session: SessionRecord) -> None:
        run, info, number = self.run, manifest.info, lineage.lineage
        run.lineages = {**run.lineages, number: lineage}
        run.queue.refuse_steps(
            lambda _: Refused(
                "WRONG_RUN",
                f"checkpoint {info.name!r} is being restored; open a session with lineage {number}",
                lineage=number,
            )
        )
        run.queue.refuse_saves(
            Refused(
                "WRONG_RUN",
                f"this checkpoint was not saved, because checkpoint {info.name!r} was restored first; save "
                "again to save the current state",
                lineage=number,
            )
        )
        run.head.move(HistoryPosition(run.head.computed.run_id, number, info.step, lineage.digest))
        run.lease.resume(session)
        run.conditions.set(RunState.HALTED, False)
        run.conditions.set(RunState.RESTORING, waiting_for="the weights to be loaded")
