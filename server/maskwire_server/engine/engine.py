"""The engine: the run's door for other threads, its thread, and its way up and down.

Two threads. The *run* thread owns the order of things, the pipeline and the journal; it takes messages
from an inbox, so that nothing needs a lock. The *device* thread owns the trainer.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from maskwire_server.checkpoints import download as reading
from maskwire_server.checkpoints import membership
from maskwire_server.checkpoints.membership import Membership
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import CheckpointsConfig, ServeConfig
from maskwire_server.engine import admission
from maskwire_server.engine.committer import FOLD_BYTES, RETRY_SECONDS, Reserve, make_room
from maskwire_server.engine.entries import Evaluation, Save, Step
from maskwire_server.engine.executor import Device, Trainer
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.lease import Writer
from maskwire_server.engine.pipeline import Pipeline
from maskwire_server.engine.quarantine import Poison
from maskwire_server.engine.restore import Restoring
from maskwire_server.engine.sessions import recorded_evaluation, recorded_process
from maskwire_server.engine.state import Head, Standing
from maskwire_server.engine.step_queue import Line
from maskwire_server.engine.throughput import Rate
from maskwire_server.errors import Refused, RunDirectoryError, is_shortage
from maskwire_server.history import StepsPage, StepsRequest
from maskwire_server.journal import listing
from maskwire_server.journal.journal import Journal, explained, is_full
from maskwire_server.manifest import Manifest
from maskwire_server.recovery import boot, fingerprint, inexact
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


_MESSAGES = 64  # taken in before what was computed is committed, however many more there are


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
        self._factory = factory
        self._run_dir = run_dir
        self._seed = seed
        self._canonical = canonical
        self._configuration = configuration
        self._serve = serve
        self._versions = dict(versions)
        self._on_fatal = on_fatal
        self._accept_inexact_replay = accept_inexact_replay
        self._accept_lost_history = accept_lost_history
        self._clock = clock

        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owed: set[Future[Any]] = set()  # the answers that somebody waits for
        self._thread = threading.Thread(target=self._main, name="maskwire-run", daemon=True)
        self._serving: Future[None] = Future()
        self._stopping = self._stopped = False
        self._info: ModelInfo | None = None
        self._head = Head()
        self._standing = Standing()
        self._line = Line(clock, serve.gap_seconds)
        self._writer = Writer(serve.session_idle_seconds, clock)
        self._rate = Rate(60, clock)
        self._device = Device(self._tell)
        self._reserve = Reserve(run_dir, serve.reserve_bytes)
        self._membership = Membership()
        self._checkpoints = Checkpoints(run_dir, membership=self._membership)
        self._saver = Saver(self._checkpoints, checkpoints, configuration, self._versions, clock)
        # Made by recovery, from the journal:
        self._journal: Journal | None = None
        self._pipeline: Pipeline

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
        limits = Limits(
            serve.max_batch_tokens,
            serve.max_message_bytes,
            serve.window,
            serve.max_draws,
            serve.max_generation_steps,
        )
        read_tokens = serve.max_read_tokens or (self._info.read_tokens if self._info else None)
        return limits if read_tokens is None else replace(limits, max_read_tokens=read_tokens)

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch; the answer comes when it is durable.

        Cancelling the future gives the step up if it has not begun.
        """
        future: Future[StepAnswer] = Future()
        step = Step(request, request.payload.hash(), request.payload.encode(), [future], self._clock())
        return self._post(future, lambda: self._pipeline.admit(step))

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """A step was refused before it came here: what waits behind it need wait no longer."""
        if session is not None and step is not None and self._serving.done():
            self._tell(lambda: self._pipeline.step_refused(session, step))

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch; the answer comes when the steps that it saw are durable."""
        future: Future[EvalAnswer] = Future()
        return self._post(future, lambda: self._pipeline.line_up(Evaluation(request, future)))

    def generate(self, request: GenerateRequest) -> Generation:
        """Sample rows; iterate over what it returns for the answers, and cancel it when nobody reads them.

        An answer comes when the steps that it saw are durable.
        """
        generation = Generation(request)
        self._post(generation.future, lambda: self._pipeline.line_up(generation))
        return generation

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint; the answer comes when it is durable and verified."""
        future: Future[CheckpointInfo] = Future()
        return self._post(future, lambda: self._pipeline.save(request, future))

    def restore(self, request: RestoreRequest) -> Future[RestoreAnswer]:
        """Go back to a checkpoint, on a new lineage."""
        future: Future[RestoreAnswer] = Future()
        return self._post(future, lambda: self._pipeline.restore(request, future))

    def delete(self, name: str) -> Future[None]:
        """Delete a checkpoint that nothing needs."""
        future: Future[None] = Future()
        return self._post(future, lambda: self._pipeline.delete(name, future))

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""
        future: Future[SessionAnswer] = Future()
        return self._post(future, lambda: self._pipeline.open_session(request, future))

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""
        future: Future[None] = Future()
        return self._post(future, lambda: self._pipeline.close_session(session, future))

    def checkpoints(self) -> list[CheckpointInfo]:
        """The whole checkpoints of the run's own history, newest first; others are not shown."""
        if not self._membership.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; ask again")
        self._recognise_new(self._checkpoints.all())
        return [manifest.info for manifest in self._checkpoints.own()]

    def download(self, request: DownloadRequest) -> Iterator[Chunk]:
        """A checkpoint's files in chunks; it is kept until the iterator ends or is closed."""
        if not self._membership.run_id:
            raise Refused("RECOVERING", "the server is reading the run's journal; ask again")
        self._recognise_new(self._checkpoints.named(request.name))
        return reading.read(self._checkpoints, request)

    def _recognise_new(self, manifests: Iterable[Manifest]) -> None:
        """Let the run thread look up checkpoints that somebody put back while the server runs."""
        if self._serving.done() and any(self._membership.unknown(manifest) for manifest in manifests):
            looked: Future[None] = Future()

            def look() -> None:
                assert self._journal is not None
                self._checkpoints.recognise(self._journal)
                answer(looked, None)

            self._post(looked, look).result()

    def list_steps(self, request: StepsRequest) -> Future[StepsPage]:
        """Recorded steps of one lineage, a page of them."""
        future: Future[StepsPage] = Future()

        def read() -> None:
            assert self._journal is not None
            if not future.cancelled():
                answer(future, listing.page(self._journal, self._head.run_id, request))

        return self._post(future, read)

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
            tokenizer=head.tokenizer,
            data=head.data,
            inexact_replays=head.inexact_replays,
        )

    def drain(self, timeout: float) -> bool:
        """Refuse what waits, finish what runs, save if anything was trained; True when done in time."""
        if not self._serving.done() or not self._thread.is_alive():
            return True
        done: Future[None] = Future()
        self._tell(lambda: self._pipeline.drain(done))
        try:
            done.result(timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Stop the threads and release the run directory; whatever still waits is refused."""
        self._stopping = True  # before what waits in the inbox, and nothing more gets in
        if self._thread.ident is not None:
            self._tell(lambda: None)
            self._thread.join()
        self._device.close()

    def _post(self, future: Future[T], act: Callable[[], None]) -> Future[T]:
        if not self._serving.done() or self._stopping:
            admission.refuse_unavailable(self._standing.state)
            raise _ends()

        def guarded() -> None:
            try:
                act()
            except Refused as error:
                refuse(future, error)
            except RunDirectoryError as error:  # a record that an answer needs was damaged
                log.error("%s", error)
                refuse(future, Refused("HISTORY_LOST", str(error)))
            except (OSError, MemoryError) as error:
                if not is_shortage(error):
                    raise
                refuse(future, self._standing.failed("a request", error))

        self._owed.add(future)
        future.add_done_callback(self._owed.discard)
        self._inbox.put(guarded)
        if self._stopped:  # it can have been after the last look at what is owed
            self._refuse_owed()
        return future

    def _tell(self, act: Callable[[], None]) -> None:
        self._inbox.put(act)

    # The run thread.

    def _main(self) -> None:
        try:
            with explained(self._run_dir):
                self._recover()
        except BaseException as error:
            self._standing.last_error = f"recovery failed: {type(error).__name__}"
            self._standing.set(RunState.RECOVERY_FAILED)
            self._shut_down()
            self._serving.set_exception(error)
            return
        self._serving.set_result(None)
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            log.critical("the engine failed; the process ends, and a restart goes on", exc_info=True)
            self._on_fatal(error)
        finally:
            self._shut_down()

    def _turn(self) -> None:
        try:
            message = self._inbox.get(timeout=self._pipeline.patience())
            for _ in range(_MESSAGES):
                message()
                self._pipeline.feed()  # before the commit, so that the device computes meanwhile
                message = self._inbox.get_nowait()
            message()
        except queue.Empty:
            pass
        self._pipeline.settle()

    def _shut_down(self) -> None:
        self._stopping = True
        self._line.abandon(_ends())
        self._stopped = True  # from here on nobody answers but `_refuse_owed`
        self._refuse_owed()
        self._saver.close()
        if self._journal is not None:
            self._journal.close()

    def _refuse_owed(self) -> None:
        """Nobody will answer any more: whoever gets hold of a future first refuses it."""
        with contextlib.suppress(KeyError):
            while True:
                future = self._owed.pop()
                if not future.done():
                    refuse(future, _ends())

    def _has_two_bases(self, numerics: dict[str, Any]) -> bool:
        """Whether one damaged checkpoint is not the end: another, or steps that can be computed again."""
        assert self._journal is not None
        configure = self._device.configure
        if not self._head.step or fingerprint.replayable(
            self._journal, numerics, lambda *wanted: self._device.call(partial(configure, *wanted))
        ):
            return True
        here = self._head.lineage, self._head.step
        own = [manifest.info for manifest in self._checkpoints.own()]
        return sum((info.lineage, info.step) == here for info in own) > 1

    def _save_now(self, word: str) -> None:
        """Save before the first step is admitted, under a name with `word`. Raises Refused."""
        assert self._journal is not None
        name = f"{word}-{self._head.step:09d}-{uuid.uuid4().hex[:6]}" if word else None
        save = Save(SaveRequest(name), automatic=True)
        self._saver.begin()
        copy = self._device.call(self._device.snapshot)
        place, save_id = self._head.place, membership.new_save_id()
        try:
            self._journal.transaction(partial(membership.record_save, self._journal, place, save_id))
            self._saver.write(save, copy, place, save_id, self._journal).result()
        except Refused as refusal:
            self._saver.give_up(save, refusal)
            raise
        except (OSError, MemoryError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.Error) and not is_full(error):
                raise
            refused = self._standing.failed("the checkpoint", error)
            self._saver.give_up(save, refused)
            raise refused from error
        self._saver.finish()

    def _when_there_is_room(self, act: Callable[[], T]) -> T:
        """Do something that writes to the disk; while that is full, wait, as HELD would, and try again."""
        waits = False
        while True:
            try:
                return act()
            except Exception as error:
                if self._stopping or not (is_full(error) or is_full(error.__cause__)):
                    raise
                if not waits:
                    log.error("no room on the disk, the start waits until there is: %s", error)
                waits = True
            self._standing.set(RunState.RECOVERING, waiting_for="room on the disk")
            until = time.monotonic() + RETRY_SECONDS
            while not self._stopping and time.monotonic() < until:
                time.sleep(0.05)
            if self._journal is not None:
                make_room(self._journal, self._reserve)

    def _recover(self) -> None:
        began = self._clock()
        head, device = self._head, self._device
        self._journal = journal = self._when_there_is_room(
            partial(
                boot.open_journal,
                self._run_dir,
                seed=self._seed,
                canonical=self._canonical,
                durable=self._serve.durability == "full",
            )
        )
        head.run_id = journal.fact("run_id")
        if journal.log_bytes() >= FOLD_BYTES:  # of a process that was killed
            make_room(journal, self._reserve)
        self._checkpoints.recognise(journal)
        self._saver.refresh()
        said = journal.last_event("tokenizer")
        head.tokenizer = said[1]["tokenizer"] if said else ""
        said = journal.last_event("data")
        head.data = said[1] if said else {}
        head.evaluated = recorded_evaluation(journal)
        threads = None if self._serve.threads else fingerprint.pinned_threads(journal)
        self._info, versions = device.call(partial(device.build, self._factory, threads))
        self._versions.update(versions)
        log.info("trainer built on %s in %.1f s", versions.get("device", "?"), self._clock() - began)

        self._standing.set(RunState.RECOVERING, waiting_for="the newest checkpoint")
        numerics = fingerprint.numerics(self._configuration, versions)
        recovered = boot.recover(
            journal,
            self._checkpoints,
            device,
            numerics,
            accept_inexact=self._accept_inexact_replay,
            accept_lost=self._accept_lost_history is not None,
            tell=lambda words: self._standing.set(RunState.RECOVERING, waiting_for=words),
            with_room=self._when_there_is_room,
        )
        self._saver.refresh()  # some may have been set aside
        self._standing.set(RunState.RECOVERING, waiting_for="the warm-up")
        warming = self._clock()
        device.call(partial(device.begin_at, recovered.step, recovered.non_finite))
        log.info("warmed up in %.1f s", self._clock() - warming)
        if self._accept_lost_history is not None:
            recovered = boot.accept_lost_history(
                journal, recovered, self._accept_lost_history, with_room=self._when_there_is_room
            )

        head.move(recovered.lineage, recovered.step, recovered.digest)
        head.non_finite = recovered.non_finite
        self._line.begin_at(recovered.step)
        session = journal.last_session()
        self._writer.resume(session, recorded_process(journal, session))
        head.inexact_replays = self._saver.inexact_replays = inexact.recorded(journal)
        # Checkpoint 0 comes before the first step. A state that an inexact replay led to is durable before
        # a step follows from it: another replay would lead to another state.
        if self._saver.newest is None or recovered.replayed_inexactly:
            word = "accepted" if recovered.accepted else "replayed"
            try:
                self._when_there_is_room(
                    partial(self._save_now, word if recovered.replayed_inexactly else "")
                )
            except Refused as refused:
                raise RunDirectoryError(f"{self._run_dir}: {refused.message}") from refused
        elif not self._has_two_bases(numerics):
            with contextlib.suppress(Refused):  # the run is no worse off than it was
                self._save_now("changed")
        configuration_id = self._when_there_is_room(
            partial(fingerprint.record_start, journal, self._versions, numerics)
        )
        self._pipeline = Pipeline(
            journal=journal,
            device=device,
            saver=self._saver,
            restoring=Restoring(
                journal,
                self._checkpoints,
                device,
                self._line,
                self._writer,
                head,
                self._standing,
                self._saver,
                self._tell,
            ),
            line=self._line,
            writer=self._writer,
            head=head,
            standing=self._standing,
            rate=self._rate,
            serve=self._serve,
            configuration_id=configuration_id,
            reserve=self._reserve,
            poison=Poison(self._run_dir, self._serve.poison_after),
            post=self._tell,
            clock=self._clock,
        )
        self._standing.set(RunState.RECOVERING, False)
        log.info("run %s is at step %d after %.1f s", head.run_id, head.step, self._clock() - began)
