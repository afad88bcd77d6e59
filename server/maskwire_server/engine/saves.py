"""A checkpoint's way: copied between two steps, written beside the next ones; what it makes needless goes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from maskwire_server.checkpoints import membership
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Snapshot
from maskwire_server.config import ServeConfig
from maskwire_server.engine import admission
from maskwire_server.engine.committer import Commits
from maskwire_server.engine.entries import Save
from maskwire_server.engine.futures import answer
from maskwire_server.engine.state import Head, Place, Standing
from maskwire_server.engine.step_queue import Line
from maskwire_server.errors import Refused
from maskwire_server.journal.journal import Journal
from maskwire_server.results import CheckpointInfo


class Saves:
    """Only the engine's thread calls it."""

    def __init__(
        self,
        journal: Journal,
        saver: Saver,
        line: Line,
        commits: Commits,
        head: Head,
        standing: Standing,
        serve: ServeConfig,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._journal = journal
        self._saver = saver
        self._line = line
        self._commits = commits
        self._head = head
        self._standing = standing
        self._serve = serve
        self._post = post

    def copied(self, job: Save, future: Future[Snapshot]) -> None:
        """The device made the copy, or failed to: write it once everything up to here is durable."""
        error = future.exception()
        if error is not None:
            self._give_up(job, self._standing.failed("the copy for a checkpoint", error))
            return
        place = self._head.place  # the device may be a step further by the time that it is durable
        try:
            admission.refuse_unexpected(job.request, place)
        except Refused as refusal:
            self._give_up(job, refusal)
            return
        save_id = membership.new_save_id()
        self._commits.add(
            partial(membership.record_save, self._journal, place, save_id),
            partial(self._write, job, future.result(), place, save_id),
        )

    def _write(self, job: Save, snapshot: Snapshot, place: Place, save_id: str) -> None:
        # A checkpoint must not be ahead of the journal after a power loss.
        if self._serve.durability == "off" and not self._commits.fold():
            full = "the journal's disk is full; make room, and save again"
            self._give_up(job, Refused("CHECKPOINT_FAILED", full))
            return
        written = self._saver.write(job, snapshot, place, save_id, self._journal)
        written.add_done_callback(lambda done: self._post(partial(self._written, job, done)))

    def _give_up(self, job: Save, refusal: Refused) -> None:
        self._saver.give_up(job, refusal)
        self._line.unpark()

    def _written(self, job: Save, future: Future[CheckpointInfo]) -> None:
        error = future.exception()
        if error is not None:
            known = error if isinstance(error, Refused) else self._standing.failed("the checkpoint", error)
            # Whoever waits may keep it for long, and its frames hold the copy of the state.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._give_up(job, known)
            return
        self._saver.finish()
        self._line.unpark()
        if self._serve.keep_payloads == "recovery":
            gone = self._saver.droppable(self._journal.lineages(), self._head.lineage)
            if gone:
                self._commits.add(partial(self._journal.drop_payloads, gone), lambda: None)
        for waiter in job.waiters:
            answer(waiter, future.result())
