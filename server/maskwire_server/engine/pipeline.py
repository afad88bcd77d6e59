"""The pipeline: a step is admitted, computed, committed and answered, and commits overlap computation.

Everything here happens on the engine's thread, one message after another, so that nothing needs a lock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from maskwire.v1.digest import step_digest
from maskwire_server import failpoints
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.config import ServeConfig
from maskwire_server.engine import admission
from maskwire_server.engine.admission import Known, Position, StepFacts, Verdict
from maskwire_server.engine.committer import Commits, Reserve
from maskwire_server.engine.entries import Barrier, Evaluation, Save, Step
from maskwire_server.engine.executor import HALT_AFTER, Device
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.lease import Writer
from maskwire_server.engine.quarantine import Poison
from maskwire_server.engine.restore import Restoring
from maskwire_server.engine.saves import Saves
from maskwire_server.engine.sessions import Sessions
from maskwire_server.engine.state import Head, Standing
from maskwire_server.engine.step_queue import Line
from maskwire_server.engine.throughput import Rate
from maskwire_server.errors import Refused, StateLost, Unwanted
from maskwire_server.journal.ancestry import ancestry
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.requests import RestoreRequest, SaveRequest, SessionRef, SessionRequest
from maskwire_server.results import (
    CheckpointInfo,
    EvalAnswer,
    EvalResult,
    Losses,
    Outcome,
    RestoreAnswer,
    RunState,
    SessionAnswer,
    StepAnswer,
    StepResult,
)

log = logging.getLogger(__name__)

AHEAD = 2  # jobs handed to the device at once: one runs, one is ready, so that it never waits for us
WRITES = 2  # of a batch: into the write-ahead log, and from there into the database


class Pipeline:
    """Takes requests in, and steps from one move to the next."""

    def __init__(
        self,
        *,
        journal: Journal,
        device: Device,
        saver: Saver,
        restoring: Restoring,
        line: Line,
        writer: Writer,
        head: Head,
        standing: Standing,
        rate: Rate,
        serve: ServeConfig,
        configuration_id: int,
        reserve: Reserve,
        poison: Poison,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._device = device
        self._saver = saver
        self._restoring = restoring
        self._line = line
        self._writer = writer
        self._head = head
        self._standing = standing
        self._rate = rate
        self._serve = serve
        self._configuration_id = configuration_id
        self._clock = clock
        self._reserve = reserve
        self._poison = poison
        self._commits = Commits(journal, standing, clock, reserve)
        self._sessions = Sessions(journal, self._commits, line, writer, head, standing, device)
        self._post = post
        self._saves = Saves(journal, saver, line, self._commits, head, standing, serve, post)
        self._draining: Future[None] | None = None
        if head.non_finite >= HALT_AFTER:
            self._stand_halted()

    # The turn of the loop.

    def settle(self) -> None:
        """After messages: let waiting steps expire, commit, answer, and hand the device more."""
        self._line.expire()
        self._commits.flush()
        self.feed()
        while self._commits.pending and self._commits.retry_at is None:  # a barrier's own
            self._commits.flush()
            self.feed()
        if self._standing.holds(RunState.HELD):
            self._end_drain()  # nothing that was acknowledged is missing on the disk

    def patience(self) -> float | None:
        """Seconds until something is due without a message; None: nothing is."""
        deadlines = [at for at in (self._line.expires_at(), self._commits.retry_at) if at is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    # Admit.

    def position(self) -> Position:
        """Where the run stands, for admission."""
        return Position(
            state=self._standing.state,
            run_id=self._head.run_id,
            lineage=self._head.lineage,
            epoch=self._writer.epoch,
            writer=self._writer.present(self._line.busy),
            closed=self._writer.closed,
            next_step=self._line.next_step,
            window=self._serve.window,
            refused_step=self._line.refused_step,
            holder=self._writer.holder,
        )

    def admit(self, step: Step) -> None:
        """Admit a step, join it to its twin, or answer it from the record; raises Refused."""
        failpoints.passing("step.admitted")
        request = step.request
        self._line.forget_abandoned()
        known, record = None, None
        earlier = self._line.request(request.request_id)
        if earlier is not None:
            known = Known(earlier.number or earlier.request.step, earlier.payload_hash, in_flight=True)
        elif request.request_id is not None:
            record = self._journal.step_of_request(request.request_id)
            if record is not None:
                known = Known(record.step, record.payload_hash, in_flight=False)
        facts = StepFacts(
            session=request.session,
            step=request.step,
            payload_hash=step.payload_hash,
            known=known,
            step_waits=self._line.waits(request.step),
            queue_length=len(self._line),
            queue_limit=self._serve.queue_limit,
        )
        verdict = admission.admit_step(facts, self.position())
        if verdict in (Verdict.RUN, Verdict.WAIT):
            self._require_room(len(step.encoded))
        if request.session is not None:
            self._writer.touch()
        if verdict is Verdict.REPLAY and record is not None:
            self._require_present(record)
            result = StepResult(record.outcome, record.losses, record.gradient_norm)
            answer(step.waiters[0], StepAnswer(record.step, result, record.digest, replayed=True))
        elif verdict is Verdict.JOIN and earlier is not None:
            earlier.waiters += step.waiters
        elif verdict is Verdict.WAIT and request.step is not None:
            self._line.take_ahead(step, request.step)
        elif verdict is Verdict.RUN:
            self._line.take(step)
        else:  # never train what admission did not say to train
            impossible = RuntimeError(f"{verdict} of a request that nothing is known of")
            raise self._standing.failed("the admission of a step", impossible)

    def _require_present(self, record: StepRecord) -> None:
        """OK means that the step is in the history; one that a restore went back behind is not."""
        segments = ancestry(self._journal.lineages(), self._head.lineage)
        through = {segment.lineage: segment.through for segment in segments}
        last = through.get(record.lineage, -1)
        if last is not None and record.step > last:
            raise Refused(
                "WRONG_RUN",
                f"this request id was step {record.step} of lineage {record.lineage}, which a restore went "
                "back behind; make a new id to train the batch again",
                step=record.step,
                lineage=self._head.lineage,
            )

    def _require_room(self, size: int) -> None:
        # What is in the log is written once more when it is folded.
        left = self._reserve.left(self._journal.log_bytes())
        if left < WRITES * size and self._commits.make_room():
            left = self._reserve.left(self._journal.log_bytes())
        if left < 0:
            self._commits.hold()
            admission.refuse_unavailable(RunState.HELD)
        if left < WRITES * size:  # smaller ones may go on
            raise Refused(
                "HELD",
                f"the journal's disk has no room for this batch of {size} bytes; make room, and "
                "training goes on",
                batch_bytes=size,
            )

    def step_refused(self, session: SessionRef, step: int) -> None:
        """A step was refused before it came here: what waits behind it need wait no longer."""
        try:
            admission.check_session(session, self.position())
        except Refused:
            return
        self._line.miss(step)

    def line_up(self, job: Evaluation | Generation | Save) -> None:
        """Put another job in the line; raises Refused."""
        admission.refuse_unavailable(self._standing.state)
        admission.refuse_full(len(self._line), self._serve.queue_limit)
        self._line.append(job)

    # Compute.

    def feed(self) -> None:
        """Hand the device what it may have."""
        device, line = self._device, self._line
        while (
            device.outstanding < AHEAD
            and not self._standing.holds(RunState.HELD)
            and (job := line.first()) is not None
        ):
            if isinstance(job, Barrier):
                if device.outstanding or self._commits.pending:
                    return
                line.pop()
                job.act()
            elif isinstance(job, Save):
                if self._saver.busy:
                    line.park()
                    continue
                line.pop()
                self._saver.begin()
                device.submit(device.snapshot, partial(self._saves.copied, job))
            elif isinstance(job, Evaluation):
                line.pop()
                if not job.future.cancelled():
                    device.submit(partial(device.evaluate, job), partial(self._on_evaluated, job))
            elif isinstance(job, Generation):
                line.pop()
                device.submit(partial(self._generate, job), partial(self._on_generated, job))
            else:
                line.pop()
                if job.abandoned:
                    line.withdraw(job, admission.gap(job.number, job.number))
                    continue
                device.submit(partial(self._compute, job), partial(self._on_computed, job))
                if self._saver.due(job.number):
                    line.put_first(Save(SaveRequest(), automatic=True))

    def _compute(self, step: Step) -> StepResult | None:
        failpoints.passing("step.computing")
        step.started = self._clock()
        result: StepResult | None
        if self._poison.condemned(step.payload_hash):
            result = self._device.pass_over(step.number, StepResult(Outcome.POISON, Losses(math.nan)))
        else:
            with self._poison.watch(step.payload_hash):
                result = self._device.train(self._head.lineage, step.number, step.request.payload)
        try:
            step.ended = self._clock()
            failpoints.passing("step.computed")
        except BaseException as error:  # the state has moved on: the step cannot be given up any more
            raise StateLost(f"step {step.number} was computed, and then: {error}") from error
        return result

    def _on_computed(self, step: Step, future: Future[StepResult | None]) -> None:
        error = future.exception()
        if isinstance(error, StateLost):
            raise error
        if error is not None:
            self._line.withdraw(step, self._standing.failed(f"step {step.number}", error))
            self._line.miss(step.number)
            return
        result = future.result()
        if result is None and self._standing.holds(RunState.HALTED):
            self._line.withdraw(step, self._halted())
        elif result is None:
            try:  # a session may have been opened since it was admitted: it must not train inside that one
                admission.check_writer(step.request.session, self.position())
            except Refused as refusal:
                self._line.give_up(step, refusal)
            else:
                self._line.send_back(step)
        else:
            self._consume(step, result)

    def _consume(self, step: Step, result: StepResult) -> None:
        head = self._head
        head.step = step.number
        head.digest = step_digest(
            head.digest, head.lineage, step.number, step.payload_hash, int(result.outcome)
        )
        record = StepRecord(
            head.lineage,
            step.number,
            step.request.request_id,
            self._configuration_id,
            step.payload_hash,
            result.outcome,
            result.losses,
            result.gradient_norm,
            head.digest,
        )
        self._commits.add(
            partial(self._journal.add_step, record, step.encoded),
            partial(self._on_durable, step, result, head.digest),
        )
        failpoints.passing("step.consumed")
        skipped = result.outcome is Outcome.SKIPPED_NON_FINITE
        head.non_finite = head.non_finite + 1 if skipped else 0
        if head.non_finite >= HALT_AFTER:
            self._halt()

    def _halt(self) -> None:
        self._stand_halted()
        self._line.refuse_steps(lambda _: self._halted())

    def _stand_halted(self) -> None:
        step = self._head.step
        self._standing.last_error = f"steps {step - HALT_AFTER + 1} to {step} were not finite"
        self._standing.set(RunState.HALTED, waiting_for="a session with takeover")

    def _halted(self) -> Refused:
        step = self._head.step
        return Refused(
            "HALTED",
            f"steps {step - HALT_AFTER + 1} to {step} were not finite; look at the data, then open a session "
            "with takeover",
        )

    def _on_evaluated(self, job: Evaluation, future: Future[EvalResult]) -> None:
        self._line.came_back(job)
        error = future.exception()
        if isinstance(error, Unwanted):
            return
        refusal = None if error is None else self._standing.failed("the evaluation", error)
        if job.future.done():
            return  # nobody wants it any more
        if refusal is not None:
            refuse(job.future, refusal)
            return
        seen = EvalAnswer(future.result(), self._head.step, self._head.digest)
        self._commits.after(partial(answer, job.future, seen))

    def _generate(self, job: Generation) -> None:
        # What came before it on the device was heard of before this is.
        self._post(partial(self._on_generating, job))
        self._device.generate(job)

    def _on_generating(self, job: Generation) -> None:
        self._commits.after(partial(job.reveal, self._head.step, self._head.digest))

    def _on_generated(self, job: Generation, future: Future[None]) -> None:
        self._line.came_back(job)
        error = future.exception()
        if error is not None:
            job.refuse(self._standing.failed("the generation", error))
        else:
            self._commits.after(job.finish)

    # Answer.

    def _on_durable(self, step: Step, result: StepResult, digest: bytes) -> None:
        failpoints.passing("step.durable")
        self._head.durable = (step.number, digest)
        self._line.settle(step)
        self._rate.add(step.request.payload.batch.tokens)
        if step.request.session is not None:
            self._writer.touch()
        reply = StepAnswer(
            step.number,
            result,
            digest,
            queue_seconds=step.started - step.arrived,
            compute_seconds=step.ended - step.started,
            commit_seconds=self._clock() - step.ended,
        )
        for waiter in step.waiters:
            answer(waiter, reply)
        failpoints.passing("step.answered")

    # Sessions and checkpoints.

    def open_session(self, request: SessionRequest, future: Future[SessionAnswer]) -> None:
        """Make the caller the run's writer; raises Refused."""
        self._sessions.open(request, self.position(), future)

    def close_session(self, session: SessionRef, future: Future[None]) -> None:
        """End the caller's session; raises Refused."""
        self._sessions.close(session, self.position(), future)

    def save(self, request: SaveRequest, future: Future[CheckpointInfo]) -> None:
        """Save a checkpoint, or answer with the one that this request saved already; raises Refused."""
        saved = self._saver.find(request)
        if saved is None:
            if request.expected_step is not None and request.expected_step < self._head.step:
                admission.refuse_unexpected(request, self._head.place)  # no use waiting for the copy
            self.line_up(Save(request, [future]))
        else:
            answer(future, saved)

    def delete(self, name: str, future: Future[None]) -> None:
        """Delete a checkpoint; raises Refused."""
        admission.refuse_unavailable(self._standing.state)
        deleted = self._saver.delete(name, self._journal, self._head.lineage)
        deleted.add_done_callback(lambda done: self._post(partial(self._on_deleted, name, done, future)))

    def _on_deleted(self, name: str, done: Future[None], future: Future[None]) -> None:
        error = done.exception()
        self._saver.refresh()
        if error is None:
            answer(future, None)
        elif isinstance(error, Refused):
            refuse(future, error)
        else:
            refuse(future, self._standing.failed(f"the deletion of checkpoint {name!r}", error))

    def restore(self, request: RestoreRequest, future: Future[RestoreAnswer]) -> None:
        """Go back to a checkpoint once the running step is durable; raises Refused."""
        admission.refuse_unavailable(self._standing.state)
        self._require_room(0)
        self._restoring.begin(request, future)

    # The end.

    def drain(self, done: Future[None]) -> None:
        """Refuse what waits, finish what runs, save if anything was trained, then answer `done`."""
        self._standing.set(RunState.DRAINING, waiting_for="the running step and the last checkpoint")
        failpoints.passing("drain.begun")
        self._line.refuse_all(Refused("DRAINING", "the server is finishing its work; ask again"))
        self._draining = done
        self._line.append(Barrier(self._drained, lambda _: self._end_drain()))

    def _end_drain(self) -> None:
        done, self._draining = self._draining, None
        if done is not None:
            answer(done, None)

    def _drained(self) -> None:
        newest = self._saver.newest
        here = (self._head.lineage, self._head.step)
        if not self._saver.busy and newest is not None and (newest.lineage, newest.step) == here:
            self._end_drain()
            return
        last: Future[CheckpointInfo] = Future()
        last.add_done_callback(lambda _: self._end_drain())
        self._line.append(Save(SaveRequest(), [last], automatic=True))
