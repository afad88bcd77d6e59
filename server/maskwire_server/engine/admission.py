"""Admission of steps: queue new steps, and answer repeated ones. Runs on the gRPC worker threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future

from maskwire_server import failpoints
from maskwire_server.config import ServeConfig
from maskwire_server.engine import admission_rules
from maskwire_server.engine.admission_rules import Known
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Step
from maskwire_server.engine.futures import answer
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused
from maskwire_server.journal.ancestry import ancestry, includes, lineage_of
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, StepRecord
from maskwire_server.requests import SessionRef, StepRequest
from maskwire_server.results import StepAnswer, StepResult

_REFUSED_FOR_GOOD = {"DIGEST_VERSION", "PAYLOAD_MISMATCH"}
"""The reasons after which a client gives the number of a refused step to another step."""


class StepAdmission:
    """Queues new steps, joins retries to the step in flight, and answers repeated steps from the journal."""

    def __init__(
        self, run: Run, committer: Committer, serve: ServeConfig, clock: Callable[[], float]
    ) -> None:
        self._run = run
        self._committer = committer
        self._serve = serve
        self._clock = clock

    def admit(self, request: StepRequest, future: Future[StepAnswer]) -> None:
        """Queue a new step, or set `future` to the answer of a repeated one. Raises Refused."""
        try:
            self._admit(request, future)
        except Refused as refusal:
            if (
                refusal.reason in _REFUSED_FOR_GOOD
                and request.session is not None
                and request.step is not None
            ):
                self.refused(request.session, request.step)
            raise

    def _admit(self, request: StepRequest, future: Future[StepAnswer]) -> None:
        payload, version = request.payload, self._run.step_version(bare=request.session is None)
        step = Step(request, version, payload.encode(), [future], self._clock())
        failpoints.passing("step.admitted")
        by_id = request.request_id is not None and (request.session is None or request.step is None)
        with self._run.mutex:
            other = self._in_flight(step)
            new = other is None and not by_id and self._recorded(step) is None
            if new:
                self._queue(step)
        if new:
            self._run.work.set()
        # Hashes are computed without the mutex. For a new step, the executor can take it meanwhile.
        if new:
            with contextlib.suppress(MemoryError):  # the step is queued: the executor hashes it again
                _ = step.payload_hash
            return
        _ = step.payload_hash
        while True:
            if other is not None:
                _ = other.payload_hash
            with self._run.mutex:
                hashed, other = other, self._in_flight(step)
                if other is not None and other is not hashed:
                    continue  # another step has taken its place, and may not be hashed yet
                if other is not None and self._join(step, other):
                    return
                if not by_id and self._recorded(step) is None:
                    self._queue(step)
                    self._run.work.set()
                    return
                step.looked_up = True
                self._run.queue.reserve_id(step)  # so that retries join it while the journal is read
                break
        try:
            self._look_up(step, by_id)
        except Refused as refusal:
            with self._run.mutex:
                self._run.queue.refuse_step(step, refusal)
        except BaseException as error:
            with self._run.mutex:  # also for retries that joined it, and to release the id
                self._run.queue.refuse_step(step, self._run.conditions.failed("a request", error))
            raise

    def _in_flight(self, step: Step) -> Step | None:
        """Return the step in flight that this one may repeat, or None.

        The caller must hold the run's mutex. Raises Refused.
        """
        run, queue, request = self._run, self._run.queue, step.request
        admission_rules.check_writer(request.session, run.situation())
        step.use_version(run.step_version(bare=request.session is None))  # `admit` read it without the mutex
        admission_rules.check_segments(request, step.digest_version.number)
        queue.forget_abandoned_early()
        trained = None if request.request_id is None else run.trained_ids.get(request.request_id)
        if trained is not None and request.step not in (None, trained):
            raise admission_rules.other_step(trained)
        other = queue.with_id(request.request_id)
        if other is not None and other.looked_up and _of_earlier_session(other.request, request):
            other = None  # a look-up for a session that has been fenced since
        if other is not None and other.abandoned and request.step not in (None, other.request.step):
            # The client has renumbered the step and sends it again.
            other = None if queue.withdraw(other, run.next_number) else other
        if other is None and request.session is not None:
            other = queue.with_number(request.step)
        return other

    def _join(self, step: Step, other: Step) -> bool:
        """Make a retry join the step in flight that it repeats; return False if it does not repeat `other`.

        The caller must hold the run's mutex. Raises Refused.
        """
        run, request = self._run, step.request
        known = Known(other.number or other.request.step, other.request.request_id, other.payload_hash)
        if admission_rules.repeats(request, step.payload_hash, known):
            other.waiters += step.waiters
            if known.step is None and request.step is not None:
                other.expecting += [(request.step, waiter) for waiter in step.waiters]
            if request.session is not None:
                run.lease.touch()
            return True
        return False

    def _recorded(self, step: Step) -> int | None:
        """Return the number of the recorded step that this request may repeat, or None.

        The caller must hold the run's mutex.
        """
        number = step.request.step
        recorded = number is not None and number <= self._run.head.computed.step
        return number if recorded and step.request.session is not None else None

    def _queue(self, step: Step) -> None:
        """Queue a step that is not a retry. The caller must hold the mutex, and wake the executor later."""
        run, queue, number = self._run, self._run.queue, step.request.step
        at = run.situation()
        other = queue.with_number(number)
        taken = number is not None and (number < at.next_step or other is not None)
        if number is not None and taken and (other is None or not other.abandoned):
            raise admission_rules.step_taken(number, at.next_step)
        # The run's first step may have fixed the version since this step was created.
        step.use_version(run.step_version(bare=step.request.session is None))
        is_next = admission_rules.admit_step(number, queue.without_reads, self._serve.queue_limit, at)
        if step.request.session is not None:
            run.lease.touch()
        if number is not None and other is not None:
            if not queue.replace(other, step):  # it is being computed
                raise admission_rules.step_taken(number, at.next_step)
            return
        if is_next:
            queue.push_step(step, at.next_step)
        elif number is not None:
            queue.keep_early(step, number)
            self._committer.wake()  # the committer refuses the step after `gap_seconds`

    def _look_up(self, step: Step, by_id: bool) -> None:
        """Answer the step from the journal if it repeats a recorded step; otherwise queue it."""
        request = step.request
        record: StepRecord | None = None
        if by_id and request.request_id is not None:
            record = self._committer.read(Journal.step_of_request, request.request_id)
        with self._run.mutex:
            number = self._recorded(step)
            lineages, lineage = self._run.lineages, self._run.head.computed.lineage
        if record is None and number is not None:
            holder = lineage_of(ancestry(lineages, lineage), number)  # after a restore: an older lineage
            record = self._committer.read(Journal.step, holder, number)
        with self._run.mutex:
            admission_rules.check_writer(request.session, self._run.situation())
            if record is None:
                step.looked_up = False
                self._queue(step)
                self._run.work.set()
                return
            known = Known(record.step, record.request_id, record.payload_hash)
            if not admission_rules.repeats(request, step.payload_hash, known):
                raise admission_rules.step_taken(record.step, self._run.next_number)
            _require_in_history(record, self._run.lineages, lineage)
            if request.session is not None:
                self._run.lease.touch()
            self._run.queue.settle(step)
            step.refuse_other_numbers(record.step)
            waiters = list(step.waiters)
        result = StepResult(record.outcome, record.losses, record.gradient_norm)
        for waiter in waiters:
            answer(waiter, StepAnswer(record.step, result, record.digest, replayed=True))

    def refused(self, session: SessionRef, number: int) -> None:
        """Refuse the steps that wait for step `number`, because it was refused before it was queued."""
        run, queue = self._run, self._run.queue
        with run.mutex:
            try:
                admission_rules.check_session(session, run.situation())
            except Refused:
                return
            within = run.next_number <= number < run.next_number + self._serve.window
            if within and queue.with_number(number) is None:
                queue.mark_refused(number)


def _of_earlier_session(other: StepRequest, request: StepRequest) -> bool:
    """Whether `other` belongs to an earlier session than `request`, whose session is the current one."""
    return None not in (other.session, request.session) and other.session != request.session


def _require_in_history(record: StepRecord, lineages: dict[int, Lineage], lineage: int) -> None:
    """Raise Refused (WRONG_RUN) if a restore has removed a recorded step from the run's history."""
    if not includes(ancestry(lineages, lineage), record.lineage, record.step):
        raise Refused(
            "WRONG_RUN",
            f"this request id was used for step {record.step} of lineage {record.lineage}, and a restore has "
            "removed this step from the history; use a new id to train the batch again",
            step=record.step,
            lineage=lineage,
        )
