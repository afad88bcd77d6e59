"""RestoreCheckpoint: the run goes back to a checkpoint, on a new lineage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from maskwire.v1.digest import lineage_digest
from maskwire_server import failpoints
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine import admission
from maskwire_server.engine.entries import Barrier, Save
from maskwire_server.engine.executor import Device
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.lease import Writer
from maskwire_server.engine.state import Head, Standing
from maskwire_server.engine.step_queue import Line
from maskwire_server.errors import Refused
from maskwire_server.journal.journal import Journal, is_full
from maskwire_server.journal.records import Lineage, SessionRecord
from maskwire_server.manifest import Manifest
from maskwire_server.requests import RestoreRequest, SaveRequest
from maskwire_server.results import RestoreAnswer, RunState

log = logging.getLogger(__name__)


class Restoring:
    """Only the engine's thread calls it."""

    def __init__(
        self,
        journal: Journal,
        checkpoints: Checkpoints,
        device: Device,
        line: Line,
        writer: Writer,
        head: Head,
        standing: Standing,
        saver: Saver,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._journal = journal
        self._checkpoints = checkpoints
        self._device = device
        self._line = line
        self._writer = writer
        self._head = head
        self._standing = standing
        self._saver = saver
        self._post = post

    def begin(self, request: RestoreRequest, future: Future[RestoreAnswer]) -> None:
        """Restore once the running step is durable; a known request id gets its answer again."""
        if request.request_id is not None:
            for lineage in self._journal.lineages().values():
                if lineage.request_id == request.request_id:
                    if lineage.checkpoint != request.name:
                        raise Refused(
                            "PAYLOAD_MISMATCH",
                            f"this request id restored {lineage.checkpoint!r}; make a new id for a new "
                            "request",
                            name=lineage.checkpoint,
                        )
                    answer(future, RestoreAnswer(lineage.lineage, lineage.step, lineage.digest))
                    return
        self._checkpoints.recognise(self._journal)
        manifest = self._checkpoints.pin(request.name)  # before it is read and found whole
        self._line.interrupt(Refused("RESTORING", "a checkpoint is being restored; ask again"))
        self._standing.set(RunState.RESTORING, waiting_for="the checkpoint's files to be read")
        examined = self._saver.examine(manifest)
        examined.add_done_callback(
            lambda done: self._post(partial(self._examined, request, manifest, done, future))
        )

    def _examined(
        self,
        request: RestoreRequest,
        manifest: Manifest,
        done: Future[str | None],
        future: Future[RestoreAnswer],
    ) -> None:
        """Its files were read: go back once the running step is durable, unless they are damaged."""
        name, error = manifest.info.name, done.exception()
        if error is not None:
            self._give_up(name, future, self._standing.failed(f"reading checkpoint {name!r}", error))
        elif (problem := done.result()) is not None:
            damaged = Refused(
                "CHECKPOINT_DAMAGED",
                f"checkpoint {name!r} cannot be restored: {problem}; restore another",
                name=name,
                problem=problem,
            )
            self._give_up(name, future, damaged)
        elif self._standing.holds(RunState.DRAINING):
            self._give_up(name, future, Refused("DRAINING", "the server is finishing its work; ask again"))
        else:
            self._standing.set(RunState.RESTORING, waiting_for="the running step")
            act = partial(self._restore, request, manifest, future)
            self._line.put_first(Barrier(act, partial(self._give_up, name, future)))

    def _give_up(self, name: str, future: Future[RestoreAnswer], refusal: Refused) -> None:
        self._checkpoints.unpin(name)
        self._standing.set(RunState.RESTORING, False)
        refuse(future, refusal)

    def _restore(self, request: RestoreRequest, manifest: Manifest, future: Future[RestoreAnswer]) -> None:
        try:
            admission.refuse_unexpected(request, self._head.place)
            self._go_back(request, manifest, future)
        except Refused as refusal:
            self._give_up(manifest.info.name, future, refusal)

    def _go_back(self, request: RestoreRequest, manifest: Manifest, future: Future[RestoreAnswer]) -> None:
        head, info = self._head, manifest.info
        number = head.lineage + 1
        lineage = Lineage(
            number,
            info.lineage,
            info.step,
            lineage_digest(info.digest, number),
            request.request_id,
            info.name,
        )
        # The epoch is used up, so that no writer of the old lineage goes on unaware.
        session = SessionRecord(self._writer.epoch + 1, "restore", None, False, number, info.step, True)

        def write() -> None:
            self._journal.add_lineage(lineage)
            self._journal.add_session(session)

        try:
            self._journal.transaction(write)
        except Exception as error:
            if not is_full(error):
                raise
            admission.refuse_unavailable(RunState.HELD)
        self._line.refuse_steps(
            lambda _: Refused(
                "WRONG_RUN",
                f"checkpoint {info.name!r} is being restored; open a session with lineage {number}",
                lineage=number,
            )
        )
        self._line.refuse_saves(
            Refused(
                "WRONG_RUN",
                f"checkpoint {info.name!r} was restored before this one could be saved; save again to keep "
                "the state of now",
                lineage=number,
            )
        )
        failpoints.passing("restore.recorded")
        # From here on memory must follow the journal: a failure ends the process, and a restart
        # comes back on the new lineage.
        head.move(number, info.step, lineage.digest)
        self._writer.resume(session)
        self._line.begin_at(info.step)
        self._standing.set(RunState.HALTED, False)
        self._standing.set(RunState.RESTORING, waiting_for="the weights to be loaded")
        self._device.submit(
            partial(self._device.load, self._checkpoints.path(info.name), info.step),
            partial(self._loaded, RestoreAnswer(number, info.step, lineage.digest), info.name, future),
        )

    def _loaded(
        self, restored: RestoreAnswer, name: str, future: Future[RestoreAnswer], done: Future[None]
    ) -> None:
        done.result()
        failpoints.passing("restore.loaded")
        # The batches behind it may be gone: a second copy, so that damage to one is not the end of the run.
        self._line.put_first(Save(SaveRequest(), automatic=True))
        log.info("restored checkpoint %s: lineage %d from step %d", name, restored.lineage, restored.step)
        self._standing.set(RunState.RESTORING, False)
        answer(future, restored)
