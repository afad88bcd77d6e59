"""The executor thread: takes entries from the queue one at a time, numbers steps and computes them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

from maskwire.v1.digest import step_digest
from maskwire.v1.values import Losses, Outcome, RunState
from maskwire_server import call_context, failpoints
from maskwire_server.checkpoints import provenance
from maskwire_server.config import ServeConfig
from maskwire_server.engine import admission_rules
from maskwire_server.engine.commits import StepCommit
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Drain, Entry, Evaluation, Restore, Save, SessionOpening, Step
from maskwire_server.engine.futures import answer
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.mirror import Mirror
from maskwire_server.engine.quarantine import Quarantine
from maskwire_server.engine.reads import Reads
from maskwire_server.engine.restore import Restores
from maskwire_server.engine.save_thread import SaveCommit, Saves
from maskwire_server.engine.sessions import Sessions
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.trainer_interface import Trainer, guarded, snapshot
from maskwire_server.errors import DeviceLost, StateLost
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.journal.reserve import WRITES_PER_BATCH, Reserve
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SaveRequest
from maskwire_server.results import StepResult

log = logging.getLogger(__name__)

HALT_AFTER = 3
"""Non-finite steps in a row after which training halts."""


class Executor:
    """Executes queue entries, on the thread that owns the trainer. Other threads may call only `stop`."""

    def __init__(
        self,
        run: Run,
        committer: Committer,
        trainer: Trainer,
        saves: Saves,
        sessions: Sessions,
        restores: Restores,
        *,
        journal: Journal,
        disk: Reserve,
        quarantine: Quarantine | None,
        serve: ServeConfig,
        configuration_id: int,
        clock: Callable[[], float],
        mirror: Mirror | None = None,
    ) -> None:
        self._run = run
        self._committer = committer
        self._trainer = trainer
        self._saves = saves
        self._sessions = sessions
        self._restores = restores
        self._journal = journal  # read here for the size of its log only
        self._disk = disk
        self._quarantine = quarantine
        self._serve = serve
        self._configuration_id = configuration_id
        self._clock = clock
        self._reads = Reads(run, committer, trainer, sessions, serve)
        self._look_again: float | None = None  # seconds until a read that waits for steps may begin
        self._mirror = mirror
        self._stopping = False

    def stop(self) -> None:
        """Make `serve` return after the current entry. Any thread may call it."""
        self._stopping = self._restores.stopping = True
        self._run.work.set()

    def serve(self) -> None:
        """Execute entries until `stop` is called. After StateLost or DeviceLost, the process must restart."""
        while (entry := self._take()) is not None:
            call_context.current.set(entry.call if isinstance(entry, Step) else None)
            if isinstance(entry, Step):
                self._train(entry)
            elif isinstance(entry, Evaluation | Generation):
                what = "an evaluation" if isinstance(entry, Evaluation) else "a generation"
                self._run.computing.begin(what, self._run.step_timeout.unknown_seconds)
                self._reads.run(entry)
            elif isinstance(entry, Save):
                self._save(entry)
            elif isinstance(entry, SessionOpening):
                self._sessions.record(entry)
            elif isinstance(entry, Restore):
                self._restores.restore(entry)
            else:
                self._drain(entry)
            self._run.computing.end()

    def _take(self) -> Entry | None:
        """Wait for an entry that can be executed now, and number it if it is a step; None after `stop`."""
        while not self._stopping:
            with self._run.mutex:
                self._look_again = None
                entry = self._next()
            if entry is not None:
                return entry
            self._run.work.wait(self._look_again)
        return None

    def _next(self) -> Entry | None:
        """Pop the first entry that can be executed now, or return None. The caller must hold the mutex."""
        run, queue = self._run, self._run.queue
        while (entry := queue.first()) is not None:
            held = run.conditions.holds(RunState.HELD)
            if isinstance(entry, Drain):  # in HELD too: every acknowledged step is durable
                return queue.pop() if held or not run.uncommitted else None
            if held:
                return queue.pop_restore()  # it will be refused
            if isinstance(entry, Step):
                if self._refuse_invalid(entry):
                    continue
                if run.uncommitted >= self._serve.window:
                    return None
                if self._has_room(entry):
                    queue.start(entry, run.head.computed.step + 1)
                    return queue.pop()
                if not self._refuse_without_room(entry):
                    return None
            elif isinstance(entry, Save) and self._saves.busy:
                queue.pop()
                queue.park(entry)
            elif isinstance(entry, Evaluation | Generation):
                if entry.future.done():  # no caller waits for it
                    queue.pop()
                elif self._may_read():
                    queue.reading = entry
                    return queue.pop()
                elif not queue.bring_forward():
                    return None
            else:
                return queue.pop()
        return None

    def _may_read(self) -> bool:
        """Whether an evaluation or generation may begin now. If not, steps go first."""
        left = self._run.share.seconds_until_read(step_waits=self._run.queue.step_waits)
        self._look_again = left or None
        return not left

    def _refuse_invalid(self, step: Step) -> bool:
        """Remove the first step if it is abandoned, out of order, or has a digest version unlike the run's.

        Returns whether the step was removed.
        """
        run, queue = self._run, self._run.queue
        number = run.head.computed.step + 1
        fixed = run.head.digest_version
        step.refuse_other_numbers(number)
        if step.abandoned:
            queue.pop()
            queue.settle(step)
            queue.refuse_behind(number)
        elif step.request.step not in (None, number):
            queue.pop()
            queue.refuse_step(step, admission_rules.gap(step.request.step, number))
        elif fixed is not None and step.digest_version.number != fixed.number:
            queue.pop()  # hashed before a call without a session fixed the run's digest version
            offered = run.lease.digest_versions
            queue.refuse_step(step, admission_rules.other_digest_version(offered, fixed.number))
            queue.mark_refused(number)
        else:
            return False
        return True

    def _has_room(self, step: Step) -> bool:
        needed = WRITES_PER_BATCH * (self._run.uncommitted_bytes + len(step.encoded))
        return self._disk.left(self._journal.log_bytes()) >= needed

    def _refuse_without_room(self, step: Step) -> bool:
        """Refuse the first step, which does not fit on the disk. Return False while space may be freed."""
        queue, number = self._run.queue, self._run.head.computed.step + 1
        if self._run.uncommitted:
            return False
        if not step.space_requested:
            step.space_requested = True
            self._committer.request_space()  # the committer then wakes this thread
            return False
        if self._disk.left(self._journal.log_bytes()) < 0:
            self._committer.hold()
        queue.pop()
        queue.refuse_step(step, admission_rules.no_space(len(step.encoded)))
        queue.mark_refused(number)
        return True

    # Steps.

    def _train(self, step: Step) -> None:
        try:
            result = self._compute(step)
        except (StateLost, DeviceLost):
            raise
        except Exception as error:
            with self._run.mutex:
                self._run.queue.computing = None
                self._run.queue.refuse_step(step, self._run.conditions.failed(f"step {step.number}", error))
                self._run.queue.mark_refused(step.number)
            return
        self._consume(step, result)

    def _compute(self, step: Step) -> StepResult:
        batch = step.request.payload.batch
        shape = (batch.rows, batch.columns)
        step.started = self._clock()
        self._run.computing.begin(f"step {step.number}", self._run.step_timeout.of_shape(shape))
        failpoints.passing("step.computing")
        payload_hash = step.payload_hash  # before the weights change: it can fail for lack of memory
        if self._quarantine is not None and self._quarantine.holds(payload_hash):
            result = StepResult(Outcome.POISON, Losses(math.nan))
        else:
            payload = step.request.payload
            watch = self._quarantine.watch(payload_hash) if self._quarantine else contextlib.nullcontext()
            with watch, guarded(self._trainer):
                result = self._trainer.train_step(
                    self._run.head.computed.lineage,
                    step.number,
                    payload.batch,
                    payload.modes,
                    self._prepare_next,
                )
        try:
            step.ended = self._clock()
            self._run.share.end_step(step.started)
            self._run.step_timeout.add(shape, step.ended - step.started)
            failpoints.passing("step.computed")
        except BaseException as error:  # the weights have changed, so the step cannot be refused
            raise StateLost(
                f"step {step.number} was computed but could not be recorded: {error}; the server must restart"
            ) from error
        return result

    def _prepare_next(self) -> None:
        """Let the trainer prepare the step after the current one, if it is in the queue already."""
        if self._quarantine is not None:
            return  # a crash would count against the batch of the current step
        number = self._run.head.computed.step + 2
        with self._run.mutex:
            entry = self._run.queue.first()
        if not isinstance(entry, Step) or entry.abandoned or entry.request.step not in (None, number):
            return
        payload = entry.request.payload
        with contextlib.suppress(Exception):  # the step itself will raise it again
            self._trainer.prepare_step(self._run.head.computed.lineage, number, payload.batch, payload.modes)

    def _consume(self, step: Step, result: StepResult) -> None:
        """Append a computed step to the run's history, and pass it to the committer."""
        run, head = self._run, self._run.head
        here = head.computed
        digest = step_digest(here.digest, here.lineage, step.number, step.payload_hash, int(result.outcome))
        record = StepRecord(
            here.lineage,
            step.number,
            step.request.request_id,
            self._configuration_id,
            step.payload_hash,
            result.outcome,
            result.losses,
            result.gradient_norm,
            digest,
        )
        failpoints.passing("step.consumed")
        with run.mutex:
            run.queue.computing = None
            run.remember(step.request.request_id, step.number)
            head.computed = HistoryPosition(here.run_id, here.lineage, step.number, digest)
            first, head.digest_version = head.digest_version is None, step.digest_version
            run.uncommitted += 1
            run.uncommitted_bytes += len(step.encoded)
            self._committer.enqueue(StepCommit(run, step, record, result, self._clock, first_of_run=first))
            skipped = result.outcome is Outcome.SKIPPED_NON_FINITE
            head.non_finite = head.non_finite + 1 if skipped else 0
            if head.non_finite >= HALT_AFTER:
                self.halt_if_due()
                run.queue.refuse_steps(lambda _: admission_rules.halted())
            if self._saves.due(step.number) and not run.conditions.holds(RunState.DRAINING):  # a drain saves
                run.queue.push_first(Save(SaveRequest(), automatic=True))
        self._committer.wake()

    def halt_if_due(self) -> None:
        """Enter HALTED if the last HALT_AFTER steps were not finite. A session with takeover ends HALTED."""
        if self._run.head.non_finite < HALT_AFTER:
            return
        step = self._run.head.computed.step
        self._run.conditions.last_error = f"steps {step - HALT_AFTER + 1} to {step} were not finite"
        self._run.conditions.set(RunState.HALTED, waiting_for="a session with takeover")

    # Checkpoints and shutdown.

    def _save(self, save: Save) -> None:
        here = self._run.head.computed
        with self._run.mutex:
            self._saves.begin(save)
        self._run.computing.begin("the copy for a checkpoint", self._run.step_timeout.unknown_seconds)
        try:
            copy = snapshot(self._trainer)
            admission_rules.refuse_unexpected(save.request, here)
        except (DeviceLost, StateLost):
            raise
        except Exception as error:
            with self._run.mutex:
                refusal = self._run.conditions.failed("the copy for a checkpoint", error)
            self._saves.give_up(save, refusal)
            return
        finally:
            self._run.computing.end()
        self._committer.append(
            SaveCommit(
                self._saves,
                self._journal,
                save,
                copy,
                here,
                provenance.new_save_id(),
                flush=self._serve.durability == "off",
            )
        )

    def _drain(self, drain: Drain) -> None:
        """Save if steps were trained since the newest checkpoint and the disk is not full, then answer.

        Before it answers, give the mirror some time to upload the rest.
        """
        began, most = self._clock(), self._serve.drain_seconds
        if self._committer.wait_durable():
            self._saves.wait_written()
            newest, here = self._saves.newest, self._run.head.computed
            if newest is None or (newest.lineage, newest.step) != (here.lineage, here.step):
                self._save(Save(SaveRequest(), automatic=True))
                if self._committer.wait_durable():
                    self._saves.wait_written()
        if self._mirror is not None:
            left = most - (self._clock() - began) - 1.0  # so that the drain ends in time
            self._mirror.flush(min(left, most / 2))
        answer(drain.future, None)
