"""The commits of the committer: each writes to the journal, and then acts when its changes are durable."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from maskwire_server import failpoints
from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.engine.entries import Step
from maskwire_server.engine.futures import answer
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.shared_state import Run
from maskwire_server.events import StepCommitted
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, SessionRecord, StepRecord, Stretch
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.results import StepAnswer, StepResult

T = TypeVar("T")

DROPPED_AT_ONCE, DROPPED_BYTES = 256, 2**26
"""The batches and bytes after which one deletion stops, because later steps wait for it."""


@dataclass(eq=False)
class StepCommit:
    """The commit of a computed step: its record and its batch."""

    run: Run
    step: Step
    record: StepRecord
    result: StepResult
    clock: Callable[[], float]
    first_of_run: bool = False
    """Whether it is the run's first step, which fixes the run's digest version."""

    def write(self, journal: Journal) -> None:
        """Append the step's record and its batch to the journal."""
        if self.first_of_run:
            journal.fix_digest_version(self.step.digest_version)
        journal.add_step(self.record, self.step.encoded)

    def committed(self) -> None:
        """Note that the step is durable, publish it, and answer every caller that waits for it."""
        failpoints.passing("step.durable")
        run, step, record = self.run, self.step, self.record
        with run.mutex:
            run.head.durable = HistoryPosition(
                run.head.durable.run_id, record.lineage, record.step, record.digest
            )
            run.queue.settle(step)
            run.uncommitted -= 1
            run.uncommitted_bytes -= len(step.encoded)
            if step.request.session is not None:
                run.lease.touch()
            waiters = list(step.waiters)
            waiting = run.queue.first() is not None
        if waiting:  # the executor may wait for this commit
            run.work.set()
        reply = StepAnswer(
            record.step,
            self.result,
            record.digest,
            queue_seconds=step.started - step.arrived,
            compute_seconds=step.ended - step.started,
            commit_seconds=self.clock() - step.ended,
        )
        self._publish(reply)
        for waiter in waiters:
            answer(waiter, reply)
        failpoints.passing("step.answered")

    def _publish(self, reply: StepAnswer) -> None:
        """Publish the step before it is answered, so that a status requested after the answer counts it."""
        result, step = self.result, self.step
        self.run.events.publish(
            StepCommitted(
                time.time(),
                self.run.head.durable.run_id,
                self.record.lineage,
                reply.step,
                result.outcome,
                result.losses,
                result.gradient_norm,
                result.learning_rate,
                step.request.payload.batch.tokens,
                reply.queue_seconds,
                reply.compute_seconds,
                reply.commit_seconds,
                step.request.request_id,
                step.call.number if step.call else 0,
            )
        )


Events = tuple[tuple[str, dict[str, Any]], ...]
"""Events to record in the journal, each as its kind and body."""


@dataclass(eq=False)
class AnswerCommit(Generic[T]):
    """An answer that is sent when its events and all commits before it are durable."""

    future: Future[T]
    value: T
    events: Events = field(default=(), kw_only=True)

    def write(self, journal: Journal) -> None:
        """Record the events in the journal."""
        for kind, body in self.events:
            journal.add_event(kind, body)

    def committed(self) -> None:
        """Send the answer."""
        answer(self.future, self.value)


@dataclass(eq=False)
class RevealCommit:
    """Shows a generation's buffered states to its reader when the step whose weights it uses is durable."""

    generation: Generation
    seen: HistoryPosition

    def write(self, journal: Journal) -> None:
        """Write nothing, because a generation leaves no record."""

    def committed(self) -> None:
        """Let the reader see the buffered states."""
        self.generation.reveal(self.seen.step, self.seen.digest)


@dataclass(eq=False)
class SessionEnd(AnswerCommit[None]):
    """The end of a session, requested by its client."""

    epoch: int

    def write(self, journal: Journal) -> None:
        """Record that the session was closed."""
        journal.close_session(self.epoch)


@dataclass(eq=False)
class LineageCommit(AnswerCommit[None]):
    """The new lineage of a restore, and a new epoch, which fences the client that wrote the old lineage."""

    lineage: Lineage
    session: SessionRecord

    def write(self, journal: Journal) -> None:
        """Record the lineage and the session of the new epoch."""
        journal.add_lineage(self.lineage)
        journal.add_session(self.session)


@dataclass(eq=False)
class CatalogueCommit:
    """The checkpoints that were added and deleted since the journal's table was last updated."""

    catalogue: Catalogue
    changes: dict[str, Manifest | None] = field(default_factory=dict)

    def write(self, journal: Journal) -> None:
        """Update the journal's table of checkpoints."""
        self.changes = self.catalogue.record(journal)

    def committed(self) -> None:
        """Tell the catalogue that its changes are recorded."""
        self.catalogue.recorded(self.changes)


@dataclass(eq=False)
class DropBatches:
    """Batches that no recovery needs any more, deleted in several transactions."""

    stretches: list[Stretch]
    append: Callable[[DropBatches], None]
    more: bool = False

    def write(self, journal: Journal) -> None:
        """Delete as many batches as one transaction may."""
        self.more = journal.drop_payloads(self.stretches, DROPPED_AT_ONCE, DROPPED_BYTES)

    def committed(self) -> None:
        """Queue this commit again if batches are left to delete."""
        if self.more:
            self.append(self)
