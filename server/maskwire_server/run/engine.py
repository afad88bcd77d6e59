"""The engine: a step is admitted, computed, committed and answered, and commits overlap computation.

Two threads. The *run* thread owns the order of things: admission, the line, the journal. It takes
messages from an inbox, so that nothing needs a lock. The *device* thread owns the trainer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from maskwire.v1.digest import step_digest
from maskwire_server.config import CheckpointsConfig, ServeConfig
from maskwire_server.errors import Refused, StateLost
from maskwire_server.requests import (
    EvalRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import (
    CheckpointInfo,
    EvalAnswer,
    EvalResult,
    Limits,
    ModelInfo,
    Outcome,
    RestoreAnswer,
    RunState,
    SessionAnswer,
    Status,
    StepAnswer,
    StepResult,
)
from maskwire_server.run import admission, recovery
from maskwire_server.run.admission import Known, Position, StepFacts, Verdict
from maskwire_server.run.checkpoint import Checkpoints
from maskwire_server.run.commits import Commits
from maskwire_server.run.device import Device, Trainer
from maskwire_server.run.jobs import Barrier, Evaluation, Save, Step, answer, refuse
from maskwire_server.run.journal import Journal, StepRecord
from maskwire_server.run.line import Line
from maskwire_server.run.rate import Rate
from maskwire_server.run.restoring import Restoring
from maskwire_server.run.saving import Saver
from maskwire_server.run.sessions import Sessions
from maskwire_server.run.standing import Head, Standing
from maskwire_server.run.writer import Writer

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 2  # jobs handed to the device at once: one runs, one is ready, so that it never waits for us
HALT_AFTER = 3  # steps in a row that are not finite


class Engine:
    """The run. Public methods are safe from any thread; a `Refused` comes out of their futures."""

    def __init__(
        self,
        factory: Callable[[], Trainer],
        run_dir: Path,
        *,
        seed: int,
        canonical: bytes,
        configuration: dict[str, Any],
        serve: ServeConfig,
        checkpoints: CheckpointsConfig,
        versions: dict[str, str],
        on_fatal: Callable[[BaseException], None],
        accept_inexact_replay: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._factory = factory
        self._run_dir = run_dir
        self._seed = seed
        self._canonical = canonical
        self._configuration = configuration
        self._serve = serve
        self._versions = dict(versions)
        self._on_fatal = on_fatal
        self._accept_inexact_replay = accept_inexact_replay
        self._clock = clock

        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="maskwire-run", daemon=True)
        self._serving: Future[None] = Future()
        self._stopping = False
        self._info: ModelInfo | None = None
        self._configuration_id = 0
        self._head = Head()
        self._standing = Standing()
        self._line = Line(clock, serve.gap_seconds)
        self._writer = Writer(serve.session_idle_seconds, clock)
        self._rate = Rate(60.0, clock)
        self._device = Device(self._inbox.put)
        self._checkpoints = Checkpoints(run_dir)
        self._saver = Saver(self._checkpoints, checkpoints, configuration, self._versions, clock)
        # Made by recovery, from the journal:
        self._journal: Journal | None = None
        self._commits: Commits
        self._sessions: Sessions
        self._restoring: Restoring

    # For other threads.

    def start(self) -> None:
        """Start recovering; returns at once."""
        self._thread.start()

    def wait_serving(self, timeout: float | None = None) -> None:
        """Return once steps are admitted; raises what stopped the recovery."""
        self._serving.result(timeout)

    def on_state(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener`, quickly, on every change of state."""
        self._standing.on_change(listener)

    @property
    def info(self) -> ModelInfo | None:
        """What is served; None until the model is built."""
        return self._info

    @property
    def limits(self) -> Limits:
        """Bounds on one request."""
        serve = self._serve
        return Limits(serve.max_batch_tokens, serve.max_message_bytes, serve.window, serve.max_draws)

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch; the answer comes when it is durable.

        Cancelling the future gives the step up if it has not begun.
        """
        future: Future[StepAnswer] = Future()
        step = Step(request, request.payload.hash(), request.payload.encode(), [future], self._clock())
        return self._post(future, partial(self._admit, step))

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """A step was refused before it came here: what waits behind it need wait no longer."""
        if session is not None and step is not None and self._serving.done():
            self._inbox.put(partial(self._on_step_refused, session, step))

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch; the answer comes when the steps that it saw are durable."""
        future: Future[EvalAnswer] = Future()
        return self._post(future, partial(self._line_up, Evaluation(request, future)))

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint; the answer comes when it is durable and verified."""
        future: Future[CheckpointInfo] = Future()
        return self._post(future, partial(self._on_save, request, future))

    def restore(self, request: RestoreRequest) -> Future[RestoreAnswer]:
        """Go back to a checkpoint, on a new lineage."""
        future: Future[RestoreAnswer] = Future()
        return self._post(future, partial(self._on_restore, request, future))

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""
        future: Future[SessionAnswer] = Future()
        return self._post(future, lambda: self._sessions.open(request, self._position(), future))

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""
        future: Future[None] = Future()
        return self._post(future, lambda: self._sessions.close(session, self._position(), future))

    def checkpoints(self) -> list[CheckpointInfo]:
        """The whole checkpoints, newest first."""
        return [manifest.info for manifest in self._checkpoints.all()]

    def status(self) -> Status:
        """Is it stuck or working? Never waits."""
        head, standing = self._head, self._standing
        steps_per_second, tokens_per_second = self._rate.per_second()
        durable_step, digest = head.durable
        return Status(
            state=standing.state,
            state_since=standing.since,
            waiting_for=standing.waiting_for,
            run_id=head.run_id,
            lineage=head.lineage,
            step=head.step,
            durable_step=durable_step,
            digest=digest,
            queue_length=len(self._line),
            queue_limit=self._serve.queue_limit,
            steps_per_second=steps_per_second,
            tokens_per_second=tokens_per_second,
            last_error=standing.last_error,
            writer=self._writer.present(self._line.busy),
            epoch=self._writer.epoch,
            model=self._info,
            newest_checkpoint=self._saver.newest,
            versions=self._versions,
        )

    def drain(self, timeout: float) -> bool:
        """Refuse what waits, finish what runs, save if anything was trained; True when done in time."""
        if not self._serving.done() or not self._thread.is_alive():
            return True
        done: Future[None] = Future()
        self._inbox.put(partial(self._on_drain, done))
        try:
            done.result(timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Stop the threads and release the run directory; whatever still waits is refused."""
        if self._thread.ident is not None:
            self._inbox.put(self._stop)
            self._thread.join()
        self._device.close()

    def _post(self, future: Future[T], act: Callable[[], None]) -> Future[T]:
        if not self._serving.done() or self._stopping:
            admission.refuse_unavailable(self._standing.state)
            raise Refused("DRAINING", "the server ends; ask again")

        def guarded() -> None:
            try:
                act()
            except Refused as error:
                refuse(future, error)

        self._inbox.put(guarded)
        return future

    # The run thread.

    def _main(self) -> None:
        try:
            self._recover()
        except BaseException as error:
            self._standing.last_error = f"recovery failed: {type(error).__name__}"
            self._standing.set(RunState.RECOVERY_FAILED)
            self._shut_down()
            self._serving.set_exception(error)
            return
        self._serving.set_result(None)
        try:
            self._loop()
        except BaseException as error:
            log.critical("the engine failed; the process ends, and a restart goes on", exc_info=True)
            self._on_fatal(error)
        finally:
            self._shut_down()

    def _loop(self) -> None:
        while not self._stopping:
            try:
                message = self._inbox.get(timeout=self._patience())
                while True:
                    message()
                    self._feed()  # before the commit, so that the device computes meanwhile
                    message = self._inbox.get_nowait()
            except queue.Empty:
                pass
            self._line.expire()
            self._commits.flush()
            self._feed()
            while self._commits.pending and self._commits.retry_at is None:  # a barrier's own
                self._commits.flush()
                self._feed()

    def _shut_down(self) -> None:
        self._stopping = True
        self._line.abandon(Refused("DRAINING", "the server ends; ask again"))
        self._saver.close()
        if self._journal is not None:
            self._journal.close()

    def _patience(self) -> float | None:
        deadlines = [at for at in (self._line.expires_at(), self._commits.retry_at) if at is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _stop(self) -> None:
        self._stopping = True

    def _recover(self) -> None:
        began = self._clock()
        head, device = self._head, self._device
        self._journal = journal = recovery.open_journal(
            self._run_dir,
            seed=self._seed,
            canonical=self._canonical,
            durable=self._serve.durability == "full",
        )
        head.run_id = journal.fact("run_id")
        self._info, versions = device.call(partial(device.build, self._factory))
        self._versions.update(versions)
        log.info("trainer built on %s in %.1f s", versions.get("device", "?"), self._clock() - began)

        self._standing.set(RunState.RECOVERING, waiting_for="the newest checkpoint and the replay")
        numerics = recovery.numerics(self._configuration)
        recovered = recovery.recover(
            journal, self._checkpoints, device, numerics, accept_inexact=self._accept_inexact_replay
        )
        self._standing.set(RunState.RECOVERING, waiting_for="the warm-up")
        device.call(partial(device.begin_at, recovered.step))
        self._configuration_id = recovery.record_start(journal, self._versions, numerics)

        head.move(recovered.lineage, recovered.step, recovered.digest)
        head.non_finite = recovered.non_finite
        self._line.begin_at(recovered.step)
        self._writer.resume(journal.last_session())
        self._commits = Commits(journal, self._standing, self._clock)
        self._sessions = Sessions(journal, self._commits, self._line, self._writer, head, self._standing)
        self._restoring = Restoring(
            journal, self._checkpoints, device, self._line, self._writer, head, self._standing
        )
        if self._saver.newest is None:  # checkpoint 0 comes before the first step
            self._saver.write(
                Save(SaveRequest(), automatic=True), device.call(device.snapshot), head
            ).result()
            self._saver.finish(journal, head.lineage)
        if head.non_finite >= HALT_AFTER:
            self._standing.set(RunState.HALTED)
        self._standing.set(RunState.RECOVERING, False)
        log.info("run %s is at step %d after %.1f s", head.run_id, head.step, self._clock() - began)

    def _failed(self, what: str, error: BaseException) -> Refused:
        error_id = uuid.uuid4().hex[:12]
        self._standing.last_error = f"{what} failed, error id {error_id}"
        log.error("%s", self._standing.last_error, exc_info=error)
        return Refused(
            "INTERNAL",
            f"{what} failed and nothing changed; the server's log explains error {error_id}",
            error_id=error_id,
        )

    # Admit.

    def _position(self) -> Position:
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
        )

    def _admit(self, step: Step) -> None:
        request = step.request
        known, record = None, None
        earlier = self._line.request(request.request_id)
        if earlier is not None:
            known = Known(earlier.number or earlier.request.step, earlier.payload_hash, in_flight=True)
        elif request.request_id is not None and self._journal is not None:
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
        verdict = admission.admit_step(facts, self._position())
        if request.session is not None:
            self._writer.touch()
        if verdict is Verdict.REPLAY and record is not None:
            result = StepResult(record.outcome, record.losses, record.gradient_norm)
            answer(step.waiters[0], StepAnswer(record.step, result, record.digest, replayed=True))
        elif verdict is Verdict.JOIN and earlier is not None:
            earlier.waiters += step.waiters
        elif verdict is Verdict.WAIT and request.step is not None:
            self._line.take_ahead(step, request.step)
        else:
            self._line.take(step)

    def _on_step_refused(self, session: SessionRef, step: int) -> None:
        try:
            admission.check_session(session, self._position())
        except Refused:
            return
        if step == self._line.next_step:
            self._line.refused_step = step
        self._line.refuse_ahead(step)

    def _line_up(self, job: Evaluation | Save) -> None:
        admission.refuse_unavailable(self._standing.state)
        admission.refuse_full(len(self._line), self._serve.queue_limit)
        self._line.append(job)

    # Compute.

    def _feed(self) -> None:
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
                    return
                line.pop()
                self._saver.busy = True
                device.submit(device.snapshot, partial(self._on_snapshot, job))
            elif isinstance(job, Evaluation):
                line.pop()
                if not job.future.cancelled():
                    device.submit(partial(device.evaluate, job.request), partial(self._on_evaluated, job))
            else:
                line.pop()
                if job.abandoned:
                    line.withdraw(job, admission.gap(job.number, job.number))
                    continue
                device.submit(partial(self._compute, job), partial(self._on_computed, job))
                if self._saver.due(job.number):
                    line.put_first(Save(SaveRequest(), automatic=True))

    def _compute(self, step: Step) -> StepResult | None:
        step.started = self._clock()
        result = self._device.train(self._head.lineage, step.number, step.request.payload)
        step.ended = self._clock()
        return result

    def _on_computed(self, step: Step, future: Future[StepResult | None]) -> None:
        error = future.exception()
        if isinstance(error, StateLost):
            raise error
        if error is not None:
            self._line.withdraw(step, self._failed(f"step {step.number}", error))
            return
        result = future.result()
        if result is None:
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
        assert self._journal is not None
        self._commits.add(
            partial(self._journal.add_step, record, step.encoded),
            partial(self._on_durable, step, result, head.digest),
        )
        skipped = result.outcome is Outcome.SKIPPED_NON_FINITE
        head.non_finite = head.non_finite + 1 if skipped else 0
        if head.non_finite >= HALT_AFTER:
            self._halt(step.number)

    def _halt(self, step: int) -> None:
        self._standing.last_error = f"steps {step - HALT_AFTER + 1} to {step} were not finite"
        self._standing.set(RunState.HALTED, waiting_for="a session with takeover")
        refusal = Refused(
            "HALTED", f"{self._standing.last_error}; look at the data, then open a session with takeover"
        )
        self._line.refuse_steps(lambda _: refusal)

    def _on_evaluated(self, job: Evaluation, future: Future[EvalResult]) -> None:
        error = future.exception()
        if error is not None:
            refuse(job.future, self._failed("the evaluation", error))
            return
        seen = EvalAnswer(future.result(), self._head.step, self._head.digest)
        self._commits.after(partial(answer, job.future, seen))

    # Answer.

    def _on_durable(self, step: Step, result: StepResult, digest: bytes) -> None:
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

    # Checkpoints.

    def _on_save(self, request: SaveRequest, future: Future[CheckpointInfo]) -> None:
        saved = self._saver.find(request)
        if saved is None:
            self._line_up(Save(request, [future]))
        else:
            answer(future, saved)

    def _on_snapshot(self, job: Save, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._saver.give_up(job, self._failed("the copy for a checkpoint", error))
            return
        self._commits.after(partial(self._write_checkpoint, job, future.result()))

    def _write_checkpoint(self, job: Save, snapshot: Any) -> None:
        written = self._saver.write(job, snapshot, self._head)
        written.add_done_callback(lambda done: self._inbox.put(partial(self._on_written, job, done)))

    def _on_written(self, job: Save, future: Future[CheckpointInfo]) -> None:
        error = future.exception()
        if error is not None:
            known = error if isinstance(error, Refused) else self._failed("the checkpoint", error)
            self._saver.give_up(job, known)
            return
        assert self._journal is not None
        covered = self._saver.finish(self._journal, self._head.lineage)
        if covered is not None and self._serve.keep_payloads == "recovery":
            self._commits.add(partial(self._journal.drop_payloads, self._head.lineage, covered), lambda: None)
        for waiter in job.waiters:
            answer(waiter, future.result())

    def _on_restore(self, request: RestoreRequest, future: Future[RestoreAnswer]) -> None:
        admission.refuse_unavailable(self._standing.state)
        self._restoring.begin(request, future)

    # The end.

    def _on_drain(self, done: Future[None]) -> None:
        self._standing.set(RunState.DRAINING, waiting_for="the running step and the last checkpoint")
        self._line.refuse_all(Refused("DRAINING", "the server is finishing its work; ask again"))
        if self._standing.holds(RunState.HELD):
            answer(done, None)  # nothing that was acknowledged is missing on the disk
        else:
            self._line.append(Barrier(partial(self._drained, done), partial(refuse, done)))

    def _drained(self, done: Future[None]) -> None:
        newest = self._saver.newest
        here = (self._head.lineage, self._head.step)
        if not self._saver.busy and newest is not None and (newest.lineage, newest.step) == here:
            answer(done, None)
            return
        last: Future[CheckpointInfo] = Future()
        last.add_done_callback(lambda _: answer(done, None))
        self._line.append(Save(SaveRequest(), [last], automatic=True))
