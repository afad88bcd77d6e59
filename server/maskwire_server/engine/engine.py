"""The engine of one run: its public methods, and its start and shutdown.

A step passes through three threads. The caller's thread admits it to the queue, the executor numbers and
computes it, and the committer makes it durable and answers. The executor owns the trainer, the committer owns
the journal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from maskwire.v1.values import Limits, ModelInfo, RestoreResult, RunState
from maskwire_server import failpoints
from maskwire_server.checkpoints import download
from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine import admission_rules, status
from maskwire_server.engine.admission import StepAdmission
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.engine_options import EngineOptions
from maskwire_server.engine.entries import Drain, Evaluation, Save
from maskwire_server.engine.event_publisher import Publisher
from maskwire_server.engine.executor import Executor
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.kept_tokenizer import KeptTokenizer
from maskwire_server.engine.mirror import mirror_of
from maskwire_server.engine.progress import Progress
from maskwire_server.engine.reads import refuse_waiting_reads
from maskwire_server.engine.restore import Restores
from maskwire_server.engine.save_thread import Saves
from maskwire_server.engine.sessions import Sessions
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.startup import Ready, Startup
from maskwire_server.engine.unanswered import Unanswered
from maskwire_server.errors import Refused
from maskwire_server.journal import listing
from maskwire_server.journal.reserve import Reserve
from maskwire_server.manifest import Manifest
from maskwire_server.requests import (
    DownloadRequest,
    EvalRequest,
    GenerateRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import CheckpointInfo, Chunk, EvalAnswer, SessionAnswer, StepAnswer
from maskwire_server.run_status import RunStatus
from maskwire_server.step_listing import StepsPage, StepsRequest

log = logging.getLogger(__name__)


class Engine:
    """The engine of one run. Any thread may call the public methods; their futures raise `Refused`."""

    def __init__(self, options: EngineOptions, on_fatal: Callable[[BaseException], None]) -> None:
        self._options = options
        self._serve = options.serve
        self._on_fatal = on_fatal
        self._versions = dict(options.versions)
        self._run = Run(options.serve, options.clock)
        self._run.conditions.last_error = options.last_error
        self._catalogue = Catalogue()
        self._checkpoints = Checkpoints(options.run_dir, catalogue=self._catalogue)
        self.kept_tokenizer = KeptTokenizer(options.run_dir, self._run)
        self._disk = Reserve(options.run_dir, options.serve.reserve_bytes)
        self._saver = Saver(
            self._checkpoints, self._catalogue, options.checkpoints, options.configuration, self._versions,
            options.clock,
        )  # fmt: skip
        self._mirror = mirror_of(options, self._run, self._checkpoints, self._must_end)
        self._start = Startup(
            self._run, self._checkpoints, self._catalogue, self._saver, self._disk, options, self._versions,
            self._mirror,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._main, name="maskwire-executor", daemon=True)
        self._serving: Future[None] = Future()
        self._unanswered = Unanswered(self._run)
        self.progress: tuple[Progress, ...] = (self._run.computing, self._run.committing)
        """What the executor and the committer are doing."""
        # Set when the run has recovered:
        self._committer: Committer
        self._executor: Executor
        self._saves: Saves
        self._steps: StepAdmission
        self._sessions: Sessions
        self._restores: Restores

    # For other threads.

    def start(self) -> None:
        """Start the recovery and return at once."""
        self._thread.start()

    def wait_serving(self, timeout: float | None = None) -> None:
        """Wait until steps are admitted. Raises the error that stopped the recovery."""
        self._serving.result(timeout)

    def on_state(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener` on every change of state. It must return quickly."""
        self._run.conditions.on_change(listener)

    @property
    def events(self) -> Publisher:
        """The publisher of the run's events."""
        return self._run.events

    @property
    def info(self) -> ModelInfo | None:
        """Properties of the model; None until it is built."""
        return self._start.info

    @property
    def limits(self) -> Limits:
        """The server's limits on one request."""
        return status.limits(self._serve, self._start.read_tokens)

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch. The future is set when the step is durable.

        Cancelling the future abandons the step if it has not begun.
        """
        future: Future[StepAnswer] = Future()
        with self._unanswered.answering(future):
            self._steps.admit(request, future)
        return future

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """Refuse the steps that wait for `step`, because it was refused before it reached the engine."""
        if session is not None and step is not None and self._unanswered.serving:
            self._steps.refused(session, step)

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch. The future is set when the step whose weights were used is durable."""
        future: Future[EvalAnswer] = Future()
        with self._unanswered.answering(future):
            self._push(Evaluation(request, future))
        return future

    def generate(self, request: GenerateRequest) -> Generation:
        """Sample rows. Iterate over the result for the answers, or cancel it when they are no longer read.

        Answers come when the step whose weights are used is durable.
        """
        generation = Generation(request)
        with self._unanswered.answering(generation.future):
            self._push(generation)
        return generation

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint. The future is set when the checkpoint is durable and verified."""
        future: Future[CheckpointInfo] = Future()
        with self._unanswered.answering(future):
            if self._saves.join(request, future):
                return future
            here = self._run.head.computed
            if request.expected_step is not None and request.expected_step < here.step:
                admission_rules.refuse_unexpected(request, here)  # refuse now: the run is past that step
            self._push(Save(request, [future], arrived=self._options.clock()))
        return future

    def restore(self, request: RestoreRequest) -> Future[RestoreResult]:
        """Restore a checkpoint, from which the run continues on a new lineage."""
        future: Future[RestoreResult] = Future()
        with self._unanswered.answering(future):
            admission_rules.refuse_unavailable(self._run.conditions.state)
            self._recognise(self._checkpoints.named(request.name))
            self._restores.begin(request, future)
        return future

    def delete(self, name: str) -> Future[None]:
        """Delete a checkpoint that recovery does not need."""
        future: Future[None] = Future()
        with self._unanswered.answering(future):
            admission_rules.refuse_unavailable(self._run.conditions.state)
            self._recognise(self._checkpoints.named(name))
            self._saves.delete(name, future)
        return future

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Open a session, which makes the caller the run's only writer."""
        future: Future[SessionAnswer] = Future()
        with self._unanswered.answering(future):
            self._sessions.open(request, future)
        return future

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""
        future: Future[None] = Future()
        with self._unanswered.answering(future):
            self._sessions.close(session, future)
        return future

    def checkpoints(self) -> list[CheckpointInfo]:
        """The complete checkpoints of the run's own history, newest first."""
        if not self._catalogue.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; retry")
        self._recognise(self._checkpoints.compare())
        own = [manifest.info for manifest in self._catalogue.own()]
        return own if self._mirror is None else [info for info in own if self._mirror.shows(info)]

    def download(self, request: DownloadRequest) -> Iterator[Chunk]:
        """Return a checkpoint's files in chunks. They are kept until the iterator ends or is closed."""
        if not self._catalogue.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; retry")
        self._recognise(self._checkpoints.named(request.name))
        return download.read(self._checkpoints, request)

    def _recognise(self, manifests: Iterable[Manifest]) -> None:
        """Look up in the journal whether checkpoints that were copied in meanwhile belong to the run."""
        if self._serving.done() and any(self._catalogue.unknown(manifest) for manifest in manifests):
            self._committer.read(self._catalogue.look_up)

    def list_steps(self, request: StepsRequest) -> Future[StepsPage]:
        """Return a page of the recorded steps of one lineage."""
        self._unanswered.require_serving()
        page = self._committer.ask(listing.page, self._run.head.computed.run_id, request)
        return self._unanswered.add(page)

    @property
    def tokenizer(self) -> KeptTokenizer:
        """`kept_tokenizer`, for a request. Raises Refused unless requests are accepted."""
        self._unanswered.require_serving()
        return self.kept_tokenizer

    def status(self) -> RunStatus:
        """Report state, progress and what the run is waiting for. Never waits for the device or the disk."""
        newest = self._saver.newest
        return status.report(self._run, self._serve, self.info, newest, self._versions, self._mirror)

    def drain(self, timeout: float) -> bool:
        """Refuse queued requests, finish the current one, and save if needed; False after `timeout` s."""
        if not self._serving.done() or not self._thread.is_alive():
            return True
        done: Future[None] = Future()
        with self._run.mutex:
            self._run.conditions.set(
                RunState.DRAINING, waiting_for="the running step and the last checkpoint"
            )
            failpoints.passing("drain.begun")
            self._run.queue.refuse_all(admission_rules.shutting_down())
            self._run.queue.push(Drain(done))
            self._run.work.set()
        self._sessions.refuse_all(admission_rules.shutting_down())
        try:
            done.result(timeout)
        except TimeoutError:
            return False
        except Refused:  # the process is ending already
            pass
        return True

    def close(self) -> None:
        """Refuse queued requests, stop the threads and release the run directory."""
        self._start.stop()
        if self._thread.ident is None:
            return
        if self._serving.done():  # answer waiting callers before the current entry ends
            self._refuse_everything()
        if hasattr(self, "_executor"):
            self._executor.stop()
        self._thread.join()

    def _push(self, entry: Evaluation | Generation | Save) -> None:
        with self._run.mutex:
            admission_rules.refuse_unavailable(self._run.conditions.state)
            if isinstance(entry, Save):
                admission_rules.refuse_full(self._run.queue.without_reads, self._serve.queue_limit)
            else:
                refuse_waiting_reads(self._run, self._serve, entry.request.credential)
            self._run.queue.push(entry)
            self._run.work.set()

    # The executor's thread.

    def _main(self) -> None:
        try:
            recovered = self._start.recover()
        except BaseException as error:
            with self._run.mutex:
                self._run.conditions.last_error = f"recovery failed: {type(error).__name__}"
                self._run.conditions.set(RunState.RECOVERY_FAILED)
            self._unanswered.end()
            self._start.close()
            self._serving.set_exception(error)
            return
        self._build(recovered)
        if self._start.stopping:  # `close` found no executor to stop
            self._executor.stop()
        self._committer.start()
        if self._mirror is not None:
            self._mirror.start(self._committer)
        with self._run.mutex:
            self._run.lease.opened()  # its idle time starts now, however long the start took
            self._run.conditions.set(RunState.RECOVERING, False)
        self._unanswered.begin()
        self._serving.set_result(None)
        try:
            self._executor.serve()
        except BaseException as error:
            log.critical("the engine failed: the server exits; restart it to recover the run", exc_info=True)
            self._on_fatal(error)
        finally:
            self._shut_down()

    def _build(self, ready: Ready) -> None:
        """Build the committer, the executor and the other parts that serve the recovered run."""
        run, serve, clock, mirror = self._run, self._serve, self._options.clock, self._mirror
        journal, disk, mirrored = ready.journal, self._disk, mirror is not None and mirror.awaited
        self._committer = Committer(run, journal, disk, clock, self._must_end, mirrored=mirrored)
        self._saves = Saves(
            run, self._committer, self._catalogue, self._saver, self._options.checkpoints,
            serve, clock, mirror,
        )  # fmt: skip
        self._sessions = Sessions(run, self._committer, pretrained=self._options.pretrained)
        self._restores = Restores(run, self._committer, self._checkpoints, ready.trainer)
        self._steps = StepAdmission(run, self._committer, serve, clock)
        self._executor = Executor(
            run, self._committer, ready.trainer, self._saves, self._sessions, self._restores,
            journal=journal, disk=disk, quarantine=ready.quarantine, serve=serve,
            configuration_id=ready.configuration_id, clock=clock, mirror=mirror,
        )  # fmt: skip
        self._executor.halt_if_due()

    def _must_end(self, error: BaseException) -> None:
        """End the process after a fatal error of the committer or the mirror. Any thread may call it."""
        self._on_fatal(error)
        self._executor.stop()

    def _shut_down(self) -> None:
        self._refuse_everything()
        if self._mirror is not None:
            self._mirror.close()
        self._saves.end()
        self._committer.close()
        self._saves.close()
        self._start.close()

    def _refuse_everything(self) -> None:
        with self._run.mutex:
            self._unanswered.end()
            self._run.queue.refuse_all(admission_rules.shutting_down())
        self._unanswered.refuse_all()
