"""What the committer makes durable, and what follows from it."""

from __future__ import annotations

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
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, SessionRecord, StepRecord, Stretch
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.results import StepAnswer, StepResult

T = TypeVar("T")

DROPPED_AT_ONCE = 256
"""Batches that one transaction deletes at most, so that the steps after it do not wait long."""


@dataclass(eq=False)
class StepCommit:
    """A computed step: its record and its batch."""

    run: Run
    step: Step
    record: StepRecord
    result: StepResult
    clock: Callable[[], float]
    first_of_run: bool = False
    """The run's first step: it fixes the version of the run's digest."""

    def write(self, journal: Journal) -> None:
        """Append record and batch."""
        if self.first_of_run:
            journal.fix_digest_version(self.step.digest_version)
        journal.add_step(self.record, self.step.encoded)

    def committed(self) -> None:
        """Answer everybody who waits for the step."""
        failpoints.passing("step.durable")
        run, step, record = self.run, self.step, self.record
        with run.mutex:
            run.head.durable = HistoryPosition(
                run.head.durable.run_id, record.lineage, record.step, record.digest
            )
            run.queue.settle(step)
            run.uncommitted -= 1
            run.uncommitted_bytes -= len(step.encoded)
            run.rate.add(step.request.payload.batch.tokens)
            if step.request.session is not None:
                run.lease.touch()
            waiters = list(step.waiters)
            run.work.notify()
        reply = StepAnswer(
            record.step,
            self.result,
            record.digest,
            queue_seconds=step.started - step.arrived,
            compute_seconds=step.ended - step.started,
            commit_seconds=self.clock() - step.ended,
        )
        for waiter in waiters:
            answer(waiter, reply)
        failpoints.passing("step.answered")


@dataclass(eq=False)
class AnswerCommit(Generic[T]):
    """An answer that tells of a step: it waits until that is durable."""

    future: Future[T]
    value: T

    def write(self, journal: Journal) -> None:
        """Nothing."""

    def committed(self) -> None:
        """Answer."""
        answer(self.future, self.value)


@dataclass(eq=False)
class RevealCommit:
    """The step whose weights a generation samples: its reader may see what there is once it is durable."""

    generation: Generation
    seen: HistoryPosition
    last: bool = False

    def write(self, journal: Journal) -> None:
        """Nothing."""

    def committed(self) -> None:
        """Let the reader see it, or the end."""
        if self.last:
            self.generation.finish()
        else:
            self.generation.reveal(self.seen.step, self.seen.digest)


Events = tuple[tuple[str, dict[str, Any]], ...]
"""Kinds and bodies."""


@dataclass(eq=False)
class EventsCommit(AnswerCommit[T]):
    """Events, and an answer that waits for them."""

    events: Events = ()

    def write(self, journal: Journal) -> None:
        """Record the events."""
        for kind, body in self.events:
            journal.add_event(kind, body)


@dataclass(eq=False)
class SessionEnd(AnswerCommit[None]):
    """The end of a session, said by its client."""

    epoch: int = 0

    def write(self, journal: Journal) -> None:
        """Mark it."""
        journal.close_session(self.epoch)


@dataclass(eq=False)
class LineageCommit(AnswerCommit[None]):
    """A lineage that a restore opens, and the epoch that it uses up."""

    lineage: Lineage
    session: SessionRecord

    def write(self, journal: Journal) -> None:
        """Record both."""
        journal.add_lineage(self.lineage)
        journal.add_session(self.session)


@dataclass(eq=False)
class CatalogueCommit:
    """The checkpoints that came and went, for the journal's table."""

    catalogue: Catalogue
    changes: dict[str, Manifest | None] = field(default_factory=dict)

    def write(self, journal: Journal) -> None:
        """Update the table."""
        self.changes = self.catalogue.record(journal)

    def committed(self) -> None:
        """Tell the catalogue what the table holds."""
        self.catalogue.recorded(self.changes)


@dataclass(eq=False)
class DropBatches:
    """Batches that no recovery needs any more, deleted some at a time."""

    stretches: list[Stretch]
    append: Callable[[DropBatches], None]
    more: bool = False

    def write(self, journal: Journal) -> None:
        """Delete a few."""
        self.more = journal.drop_payloads(self.stretches, DROPPED_AT_ONCE)

    def committed(self) -> None:
        """Come again for the rest."""
        if self.more:
            self.append(self)
