"""The engine: one step is admit, compute, commit, answer, and the commit overlaps the next compute.

Two threads. The *run* thread owns the order of things, that is admission, the journal and every field
below that is not marked otherwise; it takes messages from an inbox, so nothing here needs a lock. The
*device* thread owns the trainer and does what it is handed, one thing after another.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from maskwire.v1.digest import lineage_digest, step_digest
from maskwire_server.batch import Batch, Modes
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
    EvalOptions,
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
from maskwire_server.run.admission import Known, Position, SessionFacts, StepFacts, Verdict
from maskwire_server.run.checkpoint import Checkpoints, Manifest, Snapshot
from maskwire_server.run.journal import Journal, Lineage, SessionRecord, StepRecord, is_full
from maskwire_server.run.rate import Rate
from maskwire_server.run.saving import Saver
from maskwire_server.run.writer import Writer

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 2  # jobs handed to the device at once: one runs, one is ready, so that it never waits for us
HALT_AFTER = 3  # steps in a row that are not finite
HELD_RETRY_SECONDS = 1.0
TIDY_COMMITS = 256  # between two folds of the journal's write-ahead log
NUMERIC_SETTINGS = ("device", "precision", "threads", "micro_batch_tokens")  # of [serve]: they change results


class Trainer(Protocol):
    """What the engine needs of a trainer. It is built and used on the device thread alone."""

    @property
    def info(self) -> ModelInfo:
        """What is served."""

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""

    def warm_up(self) -> None:
        """Compute a step and throw it away."""

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Apply one step; StateLost if the update failed half-way."""

    def eval_loss(self, batch: Batch, options: EvalOptions) -> EvalResult:
        """Evaluate; changes nothing."""

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint over; ValueError if it does not fit."""


@dataclass(eq=False)
class _Step:
    request: StepRequest
    payload_hash: bytes
    encoded: bytes
    waiters: list[Future[StepAnswer]]
    arrived: float
    number: int = 0
    started: float = 0.0
    ended: float = 0.0

    @property
    def abandoned(self) -> bool:
        return all(waiter.cancelled() for waiter in self.waiters)


@dataclass(eq=False)
class _Eval:
    request: EvalRequest
    future: Future[EvalAnswer]


@dataclass(eq=False)
class _Save:
    request: SaveRequest
    waiters: list[Future[CheckpointInfo]] = field(default_factory=list)
    automatic: bool = False


@dataclass(eq=False)
class _Barrier:
    """Something done between two steps, when the device is idle and everything is durable."""

    act: Callable[[], None]
    refuse: Callable[[Refused], None]


def _answer(future: Future[T], value: T) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _refuse(future: Future[Any], error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


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
        self._checkpoint_settings = checkpoints
        self._versions = dict(versions)
        self._on_fatal = on_fatal
        self._accept_inexact_replay = accept_inexact_replay
        self._clock = clock

        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="maskwire-device")
        self._thread = threading.Thread(target=self._main, name="maskwire-run", daemon=True)
        self._serving: Future[None] = Future()
        self._listeners: list[Callable[[RunState], None]] = []
        self._stopping = False
        self._trainer: Trainer  # the device thread's
        self._trained = 0  # the device thread's: the step that the trainer's state is at
        self._journal: Journal
        self._saver: Saver
        self._checkpoints = Checkpoints(run_dir)
        self._info: ModelInfo | None = None

        self._recovering, self._failed = True, False
        self._held = self._halted = self._draining = self._restoring = False
        self._state, self._state_since = RunState.RECOVERING, time.time()
        self._waiting_for = "the trainer"
        self._last_error = ""

        self._run_id = ""
        self._lineage = 1
        self._configuration_id = 0
        self._assigned = 0  # the last step number given out
        self._step, self._digest = 0, b""  # after the last computed step
        self._durable = (0, b"")  # the same, after the last commit; read by other threads
        self._non_finite = 0
        self._refused_step: int | None = None
        self._writer = Writer(serve.session_idle_seconds, clock)
        self._rate = Rate(60.0, clock)

        self._queue: deque[_Step | _Eval | _Save | _Barrier] = deque()
        self._ahead: dict[int, _Step] = {}  # steps that wait for their predecessor
        self._in_flight: dict[int, _Step] = {}  # admitted, not yet durable
        self._by_request: dict[str, _Step] = {}  # of both
        self._on_device = 0
        self._writes: list[Callable[[], None]] = []  # of the next transaction
        self._after: list[Callable[[], None]] = []  # once it is durable
        self._retry_at = 0.0
        self._commits = 0

    # What other threads call.

    def start(self) -> None:
        """Start recovering; returns at once."""
        self._thread.start()

    def wait_serving(self, timeout: float | None = None) -> None:
        """Return once steps are admitted; raises what stopped the recovery."""
        self._serving.result(timeout)

    def on_state(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener`, quickly, on every change of state."""
        self._listeners.append(listener)

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
        self._refuse_before_serving()
        future: Future[StepAnswer] = Future()
        step = _Step(request, request.payload.hash(), request.payload.encode(), [future], self._clock())
        self._inbox.put(partial(self._guard, future, partial(self._admit, step)))
        return future

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """A step was refused before it came here: what waits behind it need wait no longer."""
        if session is not None and step is not None and not self._recovering:
            self._inbox.put(partial(self._on_step_refused, session, step))

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch; the answer comes when the steps it saw are durable."""
        self._refuse_before_serving()
        future: Future[EvalAnswer] = Future()
        self._inbox.put(partial(self._guard, future, partial(self._enqueue, _Eval(request, future))))
        return future

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint; the answer comes when it is durable and verified."""
        self._refuse_before_serving()
        future: Future[CheckpointInfo] = Future()
        self._inbox.put(partial(self._guard, future, partial(self._on_save, request, future)))
        return future

    def restore(self, request: RestoreRequest) -> Future[RestoreAnswer]:
        """Go back to a checkpoint, on a new lineage."""
        self._refuse_before_serving()
        future: Future[RestoreAnswer] = Future()
        self._inbox.put(partial(self._guard, future, partial(self._on_restore, request, future)))
        return future

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""
        self._refuse_before_serving()
        future: Future[SessionAnswer] = Future()
        self._inbox.put(partial(self._guard, future, partial(self._on_open, request, future)))
        return future

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""
        self._refuse_before_serving()
        future: Future[None] = Future()
        self._inbox.put(partial(self._guard, future, partial(self._on_close, session, future)))
        return future

    def checkpoints(self) -> list[CheckpointInfo]:
        """The whole checkpoints, newest first."""
        return [manifest.info for manifest in self._checkpoints.all()]

    def status(self) -> Status:
        """Is it stuck or working? Never waits."""
        steps, tokens = self._rate.per_second()
        durable_step, digest = self._durable
        newest = None if self._recovering else self._saver.newest
        return Status(
            state=self._state,
            state_since=self._state_since,
            waiting_for=self._waiting_for,
            run_id=self._run_id,
            lineage=self._lineage,
            step=self._step,
            durable_step=durable_step,
            digest=digest,
            queue_length=len(self._queue) + len(self._ahead),
            queue_limit=self._serve.queue_limit,
            steps_per_second=steps,
            tokens_per_second=tokens,
            last_error=self._last_error,
            writer=self._writer.present(bool(self._in_flight or self._ahead)),
            epoch=self._writer.epoch,
            model=self._info,
            newest_checkpoint=None if newest is None else newest.info,
            versions=self._versions,
        )

    def drain(self, timeout: float) -> bool:
        """Refuse what waits, finish what runs, save if anything was trained; True when done in time."""
        if self._recovering or not self._thread.is_alive():
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
        self._device.shutdown(wait=True)

    def _refuse_before_serving(self) -> None:
        if self._recovering or self._stopping:
            admission.refuse_unavailable(self._state)

    # The run thread.

    def _main(self) -> None:
        try:
            self._recover()
        except BaseException as error:
            self._failed, self._stopping = True, True
            self._last_error = f"recovery failed: {type(error).__name__}"
            self._publish_state()
            self._serving.set_exception(error)
            self._shut_down()
            return
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
                    message = self._inbox.get_nowait()
            except queue.Empty:
                pass
            self._expire()
            self._commit()
            self._feed()

    def _patience(self) -> float | None:
        deadlines = [step.arrived + self._serve.gap_seconds for step in self._ahead.values()]
        if self._held:
            deadlines.append(self._retry_at)
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _guard(self, future: Future[Any], act: Callable[[], None]) -> None:
        try:
            act()
        except Refused as error:
            _refuse(future, error)

    def _publish_state(self) -> None:
        state = (
            RunState.RECOVERY_FAILED if self._failed
            else RunState.RECOVERING if self._recovering
            else RunState.DRAINING if self._draining
            else RunState.HELD if self._held
            else RunState.RESTORING if self._restoring
            else RunState.HALTED if self._halted
            else RunState.SERVING
        )  # fmt: skip
        if state is self._state:
            return
        self._state, self._state_since = state, time.time()
        log.info("state %s", state.name)
        for listener in self._listeners:
            listener(state)

    def _fail(self, what: str, error: BaseException) -> Refused:
        error_id = uuid.uuid4().hex[:12]
        self._last_error = f"{what} failed, error id {error_id}"
        log.error("%s", self._last_error, exc_info=error)
        return Refused(
            "INTERNAL",
            f"{what} failed and nothing changed; the server's log explains {error_id}",
            error_id=error_id,
        )

    # Recovery.

    def _recover(self) -> None:
        began = self._clock()
        self._journal = journal = recovery.open_journal(
            self._run_dir,
            seed=self._seed,
            canonical=self._canonical,
            durable=self._serve.durability == "full",
        )
        self._run_id = journal.fact("run_id")
        lineages = journal.lineages()
        self._lineage = max(lineages)
        for name in self._checkpoints.sweep():
            log.info("removed the unfinished checkpoint %s", name)
        self._call(self._build)
        log.info("trainer built on %s in %.1f s", self._versions.get("device", "?"), self._clock() - began)

        numerics = {
            **self._configuration.get("optimizer", {}),
            **{key: self._configuration.get("serve", {}).get(key) for key in NUMERIC_SETTINGS},
        }
        self._load_and_replay(recovery.ancestry(lineages, self._lineage), numerics)
        self._call(lambda: self._trainer.warm_up())
        self._record_start(numerics)

        last = journal.last_step(self._lineage)
        start = lineages[self._lineage]
        self._step, self._digest = (last.step, last.digest) if last else (start.step, start.digest)
        self._assigned, self._durable = self._step, (self._step, self._digest)
        session = journal.last_session()
        self._writer.resume(session)
        self._count_non_finite(session)
        self._saver = Saver(
            self._checkpoints,
            self._checkpoint_settings,
            run_id=self._run_id,
            configuration=self._configuration,
            versions=self._versions,
            clock=self._clock,
        )
        if self._saver.newest is None:  # checkpoint 0 comes before the first step
            self._waiting_for = "the first checkpoint"
            manifest = self._begin_save(
                SaveRequest(), self._call(lambda: self._trainer.snapshot()), True
            ).result()
            self._saver.finished(manifest, self._lineage, set())
        self._recovering, self._waiting_for = False, ""
        self._publish_state()
        log.info("run %s at step %d after %.1f s", self._run_id, self._step, self._clock() - began)
        self._serving.set_result(None)

    def _build(self) -> None:
        self._trainer = self._factory()
        self._info = self._trainer.info
        self._versions.update(self._trainer.versions)

    def _call(self, work: Callable[[], T]) -> T:
        return self._device.submit(work).result()

    def _load_and_replay(self, segments: list[recovery.Segment], numerics: dict[str, Any]) -> None:
        manifest, damaged = recovery.newest_verified(self._checkpoints, self._journal, segments)
        for problem in damaged:
            log.warning("checkpoint passed over, its files are damaged: %s", problem)
        at = (segments[0].lineage, 0)
        if manifest is not None:
            at = (manifest.info.lineage, manifest.info.step)
            folder = self._checkpoints.path(manifest.info.name)
            self._call(lambda: self._trainer.load(folder))
            log.info("loaded checkpoint %s (step %d)", manifest.info.name, manifest.info.step)
        self._waiting_for = "the replay of the journal"
        began = self._clock()
        records = recovery.steps_to_replay(self._journal, segments, at)
        if not self._accept_inexact_replay:
            records = recovery.check_configuration(self._journal, records, numerics)
        count, inexact = recovery.replay(
            records,
            lambda lineage, step, payload: self._call(
                lambda: self._trainer.train_step(lineage, step, payload.batch, payload.modes)
            ),
            accept_inexact=self._accept_inexact_replay,
        )
        if count:
            log.info("replayed %d steps in %.1f s", count, self._clock() - began)
        if inexact:
            self._journal.transaction(partial(self._journal.add_event, "inexact_replay", {"steps": inexact}))

    def _record_start(self, numerics: dict[str, Any]) -> None:
        journal, last = self._journal, self._journal.last_event("configuration")

        def write() -> None:
            journal.add_event("instance", {"versions": self._versions})
            if last is None or last[1] != numerics:
                self._configuration_id = journal.add_event("configuration", numerics)
            else:
                self._configuration_id = last[0]

        journal.transaction(write)

    def _count_non_finite(self, session: SessionRecord | None) -> None:
        since = session.step if session is not None and session.takeover else 0
        step = self._step
        while step > since and self._non_finite < HALT_AFTER:
            record = self._journal.step(self._lineage, step)
            if record is None or record.outcome is not Outcome.SKIPPED_NON_FINITE:
                break
            self._non_finite += 1
            step -= 1
        self._halted = self._non_finite >= HALT_AFTER

    # Admit.

    def _position(self) -> Position:
        return Position(
            state=self._state,
            run_id=self._run_id,
            lineage=self._lineage,
            epoch=self._writer.epoch,
            writer=self._writer.present(bool(self._in_flight or self._ahead)),
            closed=self._writer.closed,
            next_step=self._assigned + 1,
            window=self._serve.window,
            refused_step=self._refused_step,
        )

    def _admit(self, step: _Step) -> None:
        request = step.request
        known, earlier, record = None, None, None
        if request.request_id is not None:
            earlier = self._by_request.get(request.request_id)
            if earlier is not None:
                number = earlier.number or earlier.request.step
                known = Known(number, earlier.payload_hash, in_flight=True)
            else:
                record = self._journal.step_of_request(request.request_id)
                if record is not None:
                    known = Known(record.step, record.payload_hash, in_flight=False)
        verdict = admission.admit_step(
            StepFacts(
                request.session,
                request.step,
                step.payload_hash,
                known,
                request.step in self._ahead,
                len(self._queue) + len(self._ahead),
                self._serve.queue_limit,
            ),
            self._position(),
        )
        if request.session is not None:
            self._writer.touch()
        if verdict is Verdict.REPLAY and record is not None:
            result = StepResult(record.outcome, record.losses, record.gradient_norm)
            _answer(step.waiters[0], StepAnswer(record.step, result, record.digest, replayed=True))
        elif verdict is Verdict.JOIN and earlier is not None:
            earlier.waiters += step.waiters
        else:
            if request.request_id is not None:
                self._by_request[request.request_id] = step
            if verdict is Verdict.WAIT and request.step is not None:
                self._ahead[request.step] = step
            else:
                self._take(step)

    def _take(self, step: _Step) -> None:
        self._refused_step = None
        self._number(step)
        self._queue.append(step)
        successor = self._ahead.pop(self._assigned + 1, None)
        if successor is not None:
            self._take(successor)

    def _number(self, step: _Step) -> None:
        self._assigned += 1
        step.number = self._assigned
        self._in_flight[step.number] = step

    def _on_step_refused(self, session: SessionRef, step: int) -> None:
        try:
            admission.check_session(session, self._position())
        except Refused:
            return
        if step == self._assigned + 1:
            self._refused_step = step
        self._refuse_ahead(step)

    def _refuse_ahead(self, beyond: int) -> None:
        for number in sorted(self._ahead):
            if number > beyond:
                step = self._ahead.pop(number)
                self._give_up(step, admission.gap(number, self._assigned + 1))

    def _expire(self) -> None:
        limit = self._clock() - self._serve.gap_seconds
        expired = [number for number, step in self._ahead.items() if step.arrived <= limit]
        if expired:
            self._refuse_ahead(min(expired) - 1)

    def _give_up(self, step: _Step, error: Refused) -> None:
        if step.request.request_id is not None:
            self._by_request.pop(step.request.request_id, None)
        if self._in_flight.get(step.number) is step:
            del self._in_flight[step.number]
        for waiter in step.waiters:
            _refuse(waiter, error)

    def _enqueue(self, job: _Eval) -> None:
        admission.refuse_unavailable(self._state)
        waiting = len(self._queue) + len(self._ahead)
        if waiting >= self._serve.queue_limit:
            raise Refused(
                "QUEUE_FULL",
                f"{waiting} requests wait for the device, the limit is {self._serve.queue_limit}; ask again",
                queue_length=waiting,
                queue_limit=self._serve.queue_limit,
            )
        self._queue.append(job)

    # Compute.

    def _feed(self) -> None:
        while self._queue and self._on_device < AHEAD and not self._held:
            job = self._queue[0]
            if isinstance(job, _Barrier):
                if self._on_device or self._writes or self._after:
                    return
                self._queue.popleft()
                job.act()
            elif isinstance(job, _Save):
                if self._saver.busy:
                    return
                self._queue.popleft()
                self._saver.busy = True
                self._submit(lambda: self._trainer.snapshot(), partial(self._on_snapshot, job))
            elif isinstance(job, _Eval):
                self._queue.popleft()
                if not job.future.cancelled():
                    self._submit(partial(self._evaluate, job.request), partial(self._on_evaluated, job))
            else:
                self._queue.popleft()
                if job.abandoned:
                    self._withdraw(job, admission.gap(job.number, job.number))
                    continue
                self._submit(partial(self._compute, job), partial(self._on_computed, job))
                if self._saver.due(job.number):
                    self._queue.appendleft(_Save(SaveRequest(), automatic=True))

    def _submit(self, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        self._on_device += 1
        self._device.submit(work).add_done_callback(lambda future: self._inbox.put(partial(done, future)))

    def _compute(self, step: _Step) -> StepResult | None:
        """On the device thread: the step's result, None if its predecessor was not consumed."""
        if step.number != self._trained + 1:
            return None
        step.started = self._clock()
        payload = step.request.payload
        result = self._trainer.train_step(self._lineage, step.number, payload.batch, payload.modes)
        self._trained = step.number
        step.ended = self._clock()
        return result

    def _evaluate(self, request: EvalRequest) -> EvalResult:
        return self._trainer.eval_loss(request.batch, request.options)

    def _on_computed(self, step: _Step, future: Future[StepResult | None]) -> None:
        self._on_device -= 1
        error = future.exception()
        if isinstance(error, StateLost):
            raise error
        if error is not None:
            refusal = error if isinstance(error, Refused) else self._fail(f"step {step.number}", error)
            self._withdraw(step, refusal)
            return
        result = future.result()
        if result is None:  # an earlier step was withdrawn while this one was on its way
            if step.request.step is None:
                self._number_again(step)
            else:
                self._give_up(step, admission.gap(step.request.step, self._trained + 1))
            return
        self._consume(step, result)
        self._feed()  # before the commit, which the next computation overlaps

    def _consume(self, step: _Step, result: StepResult) -> None:
        self._digest = step_digest(
            self._digest, self._lineage, step.number, step.payload_hash, int(result.outcome)
        )
        self._step = step.number
        record = StepRecord(
            self._lineage,
            step.number,
            step.request.request_id,
            self._configuration_id,
            step.payload_hash,
            result.outcome,
            result.losses,
            result.gradient_norm,
            self._digest,
        )
        self._writes.append(partial(self._journal.add_step, record, step.encoded))
        self._after.append(partial(self._on_durable, step, result, self._digest))
        self._non_finite = self._non_finite + 1 if result.outcome is Outcome.SKIPPED_NON_FINITE else 0
        if self._non_finite >= HALT_AFTER:
            self._halted = True
            self._last_error = f"steps {step.number - HALT_AFTER + 1} to {step.number} were not finite"
            self._publish_state()
            self._refuse_steps(
                lambda _: Refused("HALTED", f"{self._last_error}; look at the data, then take over")
            )

    def _withdraw(self, step: _Step, error: Refused) -> None:
        """A step was not consumed: its number is free again, and so are those behind it."""
        self._give_up(step, error)
        behind = [job for job in self._queue if isinstance(job, _Step) and job.number > step.number]
        on_device = [s for n, s in self._in_flight.items() if n > step.number and s not in behind]
        self._assigned = step.number - 1
        for later in behind:
            self._in_flight.pop(later.number, None)
            if later.request.step is None:
                self._number(later)
            else:
                self._queue.remove(later)
                self._give_up(later, admission.gap(later.request.step, step.number))
        for later in on_device:  # they come back as not computed
            self._in_flight.pop(later.number, None)
        self._refuse_ahead(step.number)

    def _number_again(self, step: _Step) -> None:
        """A bare step whose number fell away goes to the end of the queue under a new one."""
        self._number(step)
        self._queue.append(step)

    def _on_evaluated(self, job: _Eval, future: Future[EvalResult]) -> None:
        self._on_device -= 1
        error = future.exception()
        if error is not None:
            _refuse(job.future, error if isinstance(error, Refused) else self._fail("the evaluation", error))
            return
        answer = EvalAnswer(future.result(), self._step, self._digest)
        self._after.append(partial(_answer, job.future, answer))

    # Commit and answer.

    def _commit(self) -> None:
        if self._held and self._clock() < self._retry_at:
            return
        if self._writes:
            try:
                self._journal.transaction(lambda: [write() for write in self._writes])
            except sqlite3.Error as error:
                if not is_full(error):
                    raise
                self._hold(error)
                return
            self._commits += 1
        if self._held:
            log.warning("the journal has room again; nothing was lost")
            self._held, self._waiting_for = False, ""
            self._publish_state()
        after, self._writes, self._after = self._after, [], []
        for answer in after:
            answer()
        if self._commits >= TIDY_COMMITS:
            self._commits = 0
            self._journal.tidy()

    def _hold(self, error: sqlite3.Error) -> None:
        if not self._held:
            log.error("the journal cannot be written (%s): nothing is admitted until there is room", error)
        self._held, self._waiting_for = True, f"room for the journal in {self._run_dir}"
        self._retry_at = self._clock() + HELD_RETRY_SECONDS
        self._publish_state()

    def _on_durable(self, step: _Step, result: StepResult, digest: bytes) -> None:
        now = self._clock()
        self._durable = (step.number, digest)
        self._in_flight.pop(step.number, None)
        if step.request.request_id is not None:
            self._by_request.pop(step.request.request_id, None)
        if step.request.session is not None:
            self._writer.touch()
        self._rate.add(step.request.payload.batch.tokens)
        answer = StepAnswer(
            step.number,
            result,
            digest,
            queue_seconds=step.started - step.arrived,
            compute_seconds=step.ended - step.started,
            commit_seconds=now - step.ended,
        )
        for waiter in step.waiters:
            _answer(waiter, answer)

    # Sessions.

    def _on_open(self, request: SessionRequest, future: Future[SessionAnswer]) -> None:
        given = self._journal.session_of_nonce(request.nonce)
        durable_step, _ = self._durable
        recorded = (
            recovery.digest_at(self._journal, self._lineage, request.history.step)
            if request.history is not None
            else None
        )
        facts = SessionFacts(request, given.epoch if given else None, durable_step, recorded)
        if not admission.admit_session(facts, self._position()):
            self._writer.touch()
            _answer(future, self._session_answer())
            return
        former = self._writer.epoch
        epoch = former + 1
        self._writer.open(epoch, request.client_name)  # from here on the older writer is fenced
        self._refuse_steps(partial(self._fenced, request.client_name, epoch))
        self._queue.appendleft(
            _Barrier(partial(self._open, epoch, request, future), partial(_refuse, future))
        )

    def _fenced(self, client_name: str, epoch: int, step: _Step) -> Refused:
        if step.request.session is None:
            return Refused("WRITER_PRESENT", f"{client_name!r} opened a session", writer=client_name)
        return Refused("FENCED", f"{client_name!r} took over with epoch {epoch}; stop this one", epoch=epoch)

    def _open(self, epoch: int, request: SessionRequest, future: Future[SessionAnswer]) -> None:
        session = SessionRecord(
            epoch, request.client_name, request.nonce, request.takeover, self._lineage, self._step, False
        )
        if request.takeover and self._halted:
            self._halted, self._non_finite = False, 0
            self._publish_state()
        # A retry of this call, or another writer's, can have come first while this one waited.
        if self._journal.session_of_nonce(request.nonce) is not None or epoch != self._writer.epoch:
            if epoch == self._writer.epoch:
                _answer(future, self._session_answer())
            else:
                _refuse(future, Refused("FENCED", f"epoch {epoch} was superseded while it was opened"))
            return
        self._writes.append(partial(self._journal.add_session, session))
        self._after.append(lambda: _answer(future, self._session_answer()))
        self._commit()

    def _session_answer(self) -> SessionAnswer:
        durable_step, digest = self._durable
        return SessionAnswer(
            self._run_id, self._lineage, self._writer.epoch, self._step, durable_step, digest
        )

    def _on_close(self, session: SessionRef, future: Future[None]) -> None:
        position = self._position()
        if session.epoch == position.epoch and position.closed and session.run_id == position.run_id:
            _answer(future, None)
            return
        admission.check_session(session, position)
        self._writer.closed = True
        self._writes.append(partial(self._journal.close_session, session.epoch))
        self._after.append(partial(_answer, future, None))

    def _refuse_steps(self, why: Callable[[_Step], Refused]) -> None:
        """Refuse every step that has not reached the device."""
        waiting = [job for job in self._queue if isinstance(job, _Step)]
        for step in waiting:
            self._queue.remove(step)
            self._assigned -= 1
        for step in [*waiting, *self._ahead.values()]:
            self._give_up(step, why(step))
        self._ahead.clear()

    # Checkpoints.

    def _on_save(self, request: SaveRequest, future: Future[CheckpointInfo]) -> None:
        admission.refuse_unavailable(self._state)
        saved = self._saver.find(request)
        if saved is not None:
            _answer(future, saved)
            return
        self._queue.append(_Save(request, [future]))

    def _on_snapshot(self, job: _Save, future: Future[Snapshot]) -> None:
        self._on_device -= 1
        error = future.exception()
        if error is not None:
            self._saver.finished(None, self._lineage, set())
            refusal = self._fail("the copy for a checkpoint", error)
            for waiter in job.waiters:
                _refuse(waiter, refusal)
            return
        self._after.append(partial(self._write_checkpoint, job, future.result()))

    def _write_checkpoint(self, job: _Save, snapshot: Snapshot) -> None:
        try:
            # Asked again: another save can have taken the name, or answered the request, meanwhile.
            saved = None if job.automatic else self._saver.find(job.request)
        except Refused as refusal:
            self._finish_save(job, refusal)
            return
        if saved is not None:
            self._finish_save(job, saved)
            return
        self._begin_save(job.request, snapshot, job.automatic).add_done_callback(
            lambda written: self._inbox.put(partial(self._on_written, job, written))
        )

    def _begin_save(self, request: SaveRequest, snapshot: Snapshot, automatic: bool) -> Future[Manifest]:
        return self._saver.begin(
            request,
            snapshot,
            automatic=automatic,
            lineage=self._lineage,
            step=self._step,
            digest=self._digest,
        )

    def _on_written(self, job: _Save, future: Future[Manifest]) -> None:
        error = future.exception()
        if error is not None:
            refusal = error if isinstance(error, Refused) else self._fail("the checkpoint", error)
            log.error("%s", refusal)
            self._finish_save(job, refusal)
            return
        manifest = future.result()
        pinned = {lineage.checkpoint for lineage in self._journal.lineages().values() if lineage.checkpoint}
        self._saver.finished(manifest, self._lineage, pinned)
        covered = self._saver.covered_step(self._lineage)
        if covered is not None and self._serve.keep_payloads == "recovery":
            self._writes.append(partial(self._journal.drop_payloads, self._lineage, covered))
        for waiter in job.waiters:
            _answer(waiter, manifest.info)

    def _finish_save(self, job: _Save, outcome: CheckpointInfo | Refused) -> None:
        self._saver.finished(None, self._lineage, set())
        for waiter in job.waiters:
            if isinstance(outcome, Refused):
                _refuse(waiter, outcome)
            else:
                _answer(waiter, outcome)

    def _on_restore(self, request: RestoreRequest, future: Future[RestoreAnswer]) -> None:
        admission.refuse_unavailable(self._state)
        if request.request_id is not None:
            for lineage in self._journal.lineages().values():
                if lineage.request_id == request.request_id:
                    _answer(future, RestoreAnswer(lineage.lineage, lineage.step, lineage.digest))
                    return
        manifest = self._checkpoints.get(request.name)
        self._restoring = True
        self._publish_state()
        act = partial(self._guard, future, partial(self._restore, request, manifest, future))
        self._queue.appendleft(_Barrier(act, partial(_refuse, future)))

    def _restore(self, request: RestoreRequest, manifest: Manifest, future: Future[RestoreAnswer]) -> None:
        try:
            self._check_restorable(request, manifest)
            info = manifest.info
            digest = lineage_digest(info.digest, self._lineage + 1)
            lineage = Lineage(
                self._lineage + 1, info.lineage, info.step, digest, request.request_id, info.name
            )
            epoch = self._writer.epoch + 1
            session = SessionRecord(epoch, "restore", None, False, lineage.lineage, info.step, True)

            def write() -> None:
                self._journal.add_lineage(lineage)
                self._journal.add_session(session)

            self._journal.transaction(write)
            self._refuse_steps(
                lambda _: Refused("WRONG_RUN", f"checkpoint {info.name!r} was restored: open a session")
            )
            self._writer.resume(session)
            self._lineage, self._step, self._digest = lineage.lineage, info.step, digest
            self._assigned, self._durable, self._refused_step = info.step, (info.step, digest), None
            self._halted, self._non_finite = False, 0
            # From here on memory must follow the journal: a failure ends the process.
            self._call(partial(self._load, self._checkpoints.path(info.name), info.step))
            log.info("restored checkpoint %s: lineage %d from step %d", info.name, self._lineage, info.step)
            _answer(future, RestoreAnswer(self._lineage, info.step, digest))
        finally:
            self._restoring = False
            self._publish_state()

    def _check_restorable(self, request: RestoreRequest, manifest: Manifest) -> None:
        for name, expected, actual in (
            ("lineage", request.expected_lineage, self._lineage),
            ("step", request.expected_step, self._step),
        ):
            if expected is not None and expected != actual:
                raise Refused(
                    "WRONG_RUN",
                    f"expected_{name} is {expected}, the run is at {name} {actual}",
                    lineage=self._lineage,
                    step=self._step,
                )
        problem = self._checkpoints.damage(manifest)
        if problem is not None or manifest.run_id != self._run_id:
            problem = problem or f"it belongs to run {manifest.run_id}"
            raise Refused(
                "CHECKPOINT_DAMAGED",
                f"checkpoint {manifest.info.name!r} cannot be restored: {problem}; restore another",
                name=manifest.info.name,
                problem=problem,
            )

    def _load(self, folder: Path, step: int) -> None:
        self._trainer.load(folder)
        self._trained = step

    # The end.

    def _on_drain(self, done: Future[None]) -> None:
        self._draining = True
        self._publish_state()
        refusal = Refused("DRAINING", "the server is finishing its work before it ends; ask again")
        self._refuse_steps(lambda _: refusal)
        self._refuse_others(refusal)
        if self._held:
            _answer(done, None)
            return
        self._queue.append(_Barrier(partial(self._drained, done), partial(_refuse, done)))

    def _drained(self, done: Future[None]) -> None:
        newest = self._saver.newest
        saved = newest is not None and (newest.info.lineage, newest.info.step) == (self._lineage, self._step)
        if self._saver.busy or not saved:
            finished: Future[CheckpointInfo] = Future()
            finished.add_done_callback(lambda _: _answer(done, None))
            self._queue.append(_Save(SaveRequest(), [finished], automatic=True))
        else:
            _answer(done, None)

    def _refuse_others(self, refusal: Refused) -> None:
        for job in list(self._queue):
            if isinstance(job, _Eval):
                _refuse(job.future, refusal)
            elif isinstance(job, _Barrier):
                job.refuse(refusal)
            elif isinstance(job, _Save):
                for waiter in job.waiters:
                    _refuse(waiter, refusal)
        self._queue.clear()

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        self._stopping = True
        refusal = Refused("DRAINING", "the server ends; ask again")
        self._refuse_steps(lambda _: refusal)
        self._refuse_others(refusal)
        for step in list(self._in_flight.values()):  # computed or running, never acknowledged
            self._give_up(step, refusal)
        if hasattr(self, "_saver"):
            self._saver.close()
        if hasattr(self, "_journal"):
            self._journal.close()
