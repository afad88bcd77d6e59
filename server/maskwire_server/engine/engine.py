"""The engine of one run: what other threads call, and how it starts and ends.

A step passes three threads in one direction: the caller's admits it into the queue, the executor's numbers
and computes it, the committer's makes it durable and answers. The executor owns the trainer, the committer
the journal.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from maskwire_server import failpoints
from maskwire_server.checkpoints import download
from maskwire_server.checkpoints.membership import Membership
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import CheckpointsConfig, ServeConfig
from maskwire_server.engine import admission
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.device import Trainer
from maskwire_server.engine.entries import Drain, Evaluation, Save
from maskwire_server.engine.executor import Executor
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.reads import Recognition, StepsRead
from maskwire_server.engine.restore import Restores
from maskwire_server.engine.run import Run
from maskwire_server.engine.saves import Saves
from maskwire_server.engine.sessions import Sessions
from maskwire_server.engine.start import Ready, Start
from maskwire_server.engine.steps import Steps
from maskwire_server.errors import Refused, is_shortage
from maskwire_server.history import StepsPage, StepsRequest
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
from maskwire_server.results import (
    CheckpointInfo,
    Chunk,
    EvalAnswer,
    Limits,
    ModelInfo,
    RestoreAnswer,
    RunState,
    SessionAnswer,
    Status,
    StepAnswer,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def _ends() -> Refused:
    return Refused("DRAINING", "the server ends; ask again")


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
        accept_lost_history: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._clock = clock
        self._on_fatal = on_fatal
        self._versions = dict(versions)
        self._settings = checkpoints
        self._run = Run(serve, clock)
        self._membership = Membership()
        self._checkpoints = Checkpoints(run_dir, membership=self._membership)
        self._disk = Reserve(run_dir, serve.reserve_bytes)
        self._saver = Saver(self._checkpoints, checkpoints, configuration, self._versions, clock)
        self._start = Start(
            self._run,
            self._checkpoints,
            self._saver,
            self._disk,
            factory=factory,
            run_dir=run_dir,
            seed=seed,
            canonical=canonical,
            configuration=configuration,
            serve=serve,
            versions=self._versions,
            accept_inexact_replay=accept_inexact_replay,
            accept_lost_history=accept_lost_history,
            clock=clock,
        )
        self._thread = threading.Thread(target=self._main, name="maskwire-executor", daemon=True)
        self._serving: Future[None] = Future()
        self._owed: set[Future[Any]] = set()  # the answers that somebody waits for
        self._stopped = False
        # Made when the run has recovered:
        self._committer: Committer
        self._executor: Executor
        self._saves: Saves
        self._steps: Steps
        self._sessions: Sessions
        self._restores: Restores

    # For other threads.

    def start(self) -> None:
        """Start recovering; returns at once."""
        self._thread.start()

    def wait_serving(self, timeout: float | None = None) -> None:
        """Return once steps are admitted; raises what stopped the recovery."""
        self._serving.result(timeout)

    def on_state(self, listener: Callable[[RunState], None]) -> None:
        """Call `listener`, quickly, on every change of state."""
        self._run.conditions.on_change(listener)

    @property
    def info(self) -> ModelInfo | None:
        """What is served; None until the model is built."""
        return self._start.info

    @property
    def limits(self) -> Limits:
        """Bounds on one request."""
        serve = self._serve
        limits = Limits(
            serve.max_batch_tokens,
            serve.max_message_bytes,
            serve.window,
            serve.max_draws,
            serve.max_generation_steps,
        )
        read_tokens = serve.max_read_tokens or (self.info.read_tokens if self.info else None)
        return limits if read_tokens is None else replace(limits, max_read_tokens=read_tokens)

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch; the answer comes when it is durable.

        Cancelling the future gives the step up if it has not begun.
        """
        future: Future[StepAnswer] = Future()
        with self._answering(future):
            self._steps.admit(request, future)
        return future

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """Tell that a step was refused before it came here: what waits for it need wait no longer."""
        if session is not None and step is not None and self._serving.done():
            self._steps.refused(session, step)

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch; the answer comes when the steps that it saw are durable."""
        future: Future[EvalAnswer] = Future()
        with self._answering(future):
            self._push(Evaluation(request, future))
        return future

    def generate(self, request: GenerateRequest) -> Generation:
        """Sample rows; iterate over what it returns for the answers, and cancel it when nobody reads them.

        An answer comes when the steps that it saw are durable.
        """
        generation = Generation(request)
        with self._answering(generation.future):
            self._push(generation)
        return generation

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint; the answer comes when it is durable and verified."""
        future: Future[CheckpointInfo] = Future()
        with self._answering(future):
            saved = self._saver.find(request)
            if saved is not None:
                answer(future, saved)
                return future
            here = self._run.head.computed
            if request.expected_step is not None and request.expected_step < here.step:
                admission.refuse_unexpected(request, here)  # no use waiting for the copy
            self._push(Save(request, [future]))
        return future

    def restore(self, request: RestoreRequest) -> Future[RestoreAnswer]:
        """Go back to a checkpoint, on a new lineage."""
        future: Future[RestoreAnswer] = Future()
        with self._answering(future):
            admission.refuse_unavailable(self._run.conditions.state)
            self._recognise(self._checkpoints.named(request.name))
            self._restores.begin(request, future)
        return future

    def delete(self, name: str) -> Future[None]:
        """Delete a checkpoint that nothing needs."""
        future: Future[None] = Future()
        with self._answering(future):
            admission.refuse_unavailable(self._run.conditions.state)
            self._recognise(self._checkpoints.named(name))
            self._saves.delete(name, future)
        return future

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""
        future: Future[SessionAnswer] = Future()
        with self._answering(future):
            self._sessions.open(request, future)
        return future

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""
        future: Future[None] = Future()
        with self._answering(future):
            self._sessions.close(session, future)
        return future

    def checkpoints(self) -> list[CheckpointInfo]:
        """The whole checkpoints of the run's own history, newest first; others are not shown."""
        if not self._membership.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; ask again")
        self._recognise(self._checkpoints.all())
        return [manifest.info for manifest in self._checkpoints.own()]

    def download(self, request: DownloadRequest) -> Iterator[Chunk]:
        """A checkpoint's files in chunks; it is kept until the iterator ends or is closed."""
        if not self._membership.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; ask again")
        self._recognise(self._checkpoints.named(request.name))
        return download.read(self._checkpoints, request)

    def _recognise(self, manifests: Iterable[Manifest]) -> None:
        """Look checkpoints up that somebody put back while the server runs."""
        if self._serving.done() and any(self._membership.unknown(manifest) for manifest in manifests):
            self._committer.read(Recognition(self._checkpoints)).result()

    def list_steps(self, request: StepsRequest) -> Future[StepsPage]:
        """Recorded steps of one lineage, a page of them."""
        self._refuse_unless_serving()
        return self._owe(self._committer.read(StepsRead(self._run.head.computed.run_id, request)))

    def status(self) -> Status:
        """Show state, progress and what the run is waiting for. Never waits for the device or the disk."""
        run, head = self._run, self._run.head
        steps_per_second, tokens_per_second = run.rate.per_second()
        durable = head.durable
        return Status(
            state=run.conditions.state,
            state_since=run.conditions.since,
            waiting_for=run.conditions.waiting_for,
            run_id=durable.run_id,
            lineage=durable.lineage,
            step=head.computed.step,
            durable_step=durable.step,
            digest=durable.digest,
            queue_length=len(run.queue),
            queue_limit=self._serve.queue_limit,
            steps_per_second=steps_per_second,
            tokens_per_second=tokens_per_second,
            last_error=run.conditions.last_error,
            writer=run.lease.present(run.queue.busy),
            epoch=run.lease.epoch,
            model=self.info,
            newest_checkpoint=self._saver.newest,
            versions=self._versions,
            tokenizer=head.tokenizer,
            data=head.data,
            inexact_replays=head.inexact_replays,
            digest_version=head.digest_version.number if head.digest_version else 0,
        )

    def drain(self, timeout: float) -> bool:
        """Refuse what waits, finish what runs, save if anything was trained; True when done in time."""
        if not self._serving.done() or not self._thread.is_alive():
            return True
        done: Future[None] = Future()
        with self._run.mutex:
            self._run.conditions.set(
                RunState.DRAINING, waiting_for="the running step and the last checkpoint"
            )
            failpoints.passing("drain.begun")
            self._run.queue.refuse_all(Refused("DRAINING", "the server is finishing its work; ask again"))
            self._run.queue.push(Drain(done))
            self._run.work.notify_all()
        try:
            done.result(timeout)
        except TimeoutError:
            return False
        except Refused:  # the process ends by itself
            pass
        return True

    def close(self) -> None:
        """Stop the threads and release the run directory; whatever still waits is refused."""
        self._start.stop()
        if self._thread.ident is None:
            return
        if self._serving.done():  # whoever waits hears of it before the entry that runs has ended
            self._refuse_everything()
        if hasattr(self, "_executor"):
            self._executor.stop()
        self._thread.join()

    def _push(self, entry: Evaluation | Generation | Save) -> None:
        with self._run.mutex:
            admission.refuse_unavailable(self._run.conditions.state)
            admission.refuse_full(len(self._run.queue), self._serve.queue_limit)
            self._run.queue.push(entry)
            self._run.work.notify()

    @contextlib.contextmanager
    def _answering(self, future: Future[T]) -> Iterator[None]:
        """Refuse in `future` what is refused within."""
        self._refuse_unless_serving()
        self._owe(future)
        try:
            yield
        except Refused as refusal:
            refuse(future, refusal)
        except (OSError, MemoryError) as error:
            if not is_shortage(error):
                raise
            with self._run.mutex:
                refused = self._run.conditions.failed("a request", error)
            refuse(future, refused)

    def _refuse_unless_serving(self) -> None:
        if not self._serving.done() or self._stopped:
            admission.refuse_unavailable(self._run.conditions.state)
            raise _ends()

    def _owe(self, future: Future[T]) -> Future[T]:
        """See to it that somebody answers when the process ends."""
        self._owed.add(future)
        future.add_done_callback(self._owed.discard)
        if self._stopped:  # it can have been after the last look at what is owed
            self._refuse_owed()
        return future

    # The executor's thread.

    def _main(self) -> None:
        try:
            recovered = self._start.recover()
        except BaseException as error:
            with self._run.mutex:
                self._run.conditions.last_error = f"recovery failed: {type(error).__name__}"
                self._run.conditions.set(RunState.RECOVERY_FAILED)
            self._stopped = True
            self._start.close()
            self._serving.set_exception(error)
            return
        self._build(recovered)
        self._committer.start()
        with self._run.mutex:
            self._run.conditions.set(RunState.RECOVERING, False)
        self._serving.set_result(None)
        try:
            self._executor.serve()
        except BaseException as error:
            log.critical("the engine failed; the process ends, and a restart recovers the run", exc_info=True)
            self._on_fatal(error)
        finally:
            self._shut_down()

    def _build(self, ready: Ready) -> None:
        """Build what serves the recovered run."""
        run, serve, clock = self._run, self._serve, self._clock
        journal, disk = ready.journal, self._disk
        self._committer = Committer(run, journal, disk, clock, self._journal_failed)
        self._saves = Saves(run, self._committer, self._saver, self._settings, serve, clock)
        self._sessions = Sessions(run, self._committer)
        self._restores = Restores(run, self._committer, self._checkpoints, ready.device)
        self._steps = Steps(run, self._committer, journal=journal, disk=disk, serve=serve, clock=clock)
        self._executor = Executor(
            run,
            self._committer,
            ready.device,
            self._saves,
            self._sessions,
            self._restores,
            journal=journal,
            disk=disk,
            quarantine=ready.quarantine,
            serve=serve,
            configuration_id=ready.configuration_id,
            clock=clock,
        )
        self._executor.halt_if_due()

    def _journal_failed(self, error: BaseException) -> None:
        """On the committer's thread: what was committed is unknown."""
        self._on_fatal(error)
        self._executor.stop()

    def _shut_down(self) -> None:
        self._refuse_everything()
        self._saves.end()
        self._committer.close()
        self._saves.close()
        self._start.close()

    def _refuse_everything(self) -> None:
        with self._run.mutex:
            self._stopped = True
            self._run.queue.refuse_all(_ends())
        self._refuse_owed()

    def _refuse_owed(self) -> None:
        """Nobody will answer any more: whoever gets hold of a future first refuses it."""
        with contextlib.suppress(KeyError):
            while True:
                future = self._owed.pop()
                if not future.done():
                    refuse(future, _ends())
