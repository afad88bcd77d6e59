"""The run's writer: sends steps in order, with several in flight, and checks each acknowledgement."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

from maskwire import results
from maskwire.arguments import check_expected, check_str, check_whole
from maskwire.errors import ConflictError, MaskwireError, UnavailableError
from maskwire.protocol import codec
from maskwire.protocol.effects import Operation, Pause, Until
from maskwire.protocol.limits import too_long
from maskwire.protocol.option_types import StepOptions
from maskwire.protocol.pending_step import PendingStep
from maskwire.protocol.retried_calls import new_id
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.session import Session
from maskwire.step_spans import StepSpans
from maskwire.v1 import training_service_pb2 as pb

log = logging.getLogger(__name__)

_RENUMBER_WAIT = 0.02  # seconds
_NUMBER_BYTES = 12  # the most bytes that a step's number adds to a request
_MAX_ID_BYTES = 11  # of a token id or a row's length in a request, with its bit of the prompt mask
_MAX_OTHER_BYTES = 4096  # of everything else in a request
_FOREIGN_HISTORY = {"GAP", "UNKNOWN_EPOCH", "WRONG_RUN"}  # also reported by a server with another history


class Writer(Session):
    """Operations of a client with a session.

    Steps are sent and acknowledged in the order of their submission, because each digest is computed from the
    previous digest. An interrupt (Ctrl-C) leaves the writer consistent: once an answer has arrived, each
    change of its state is a single assignment. A later operation can finish an interrupted step.
    """

    def __init__(
        self,
        target: str,
        policy: RetryPolicy,
        on_wait: Callable[[str], None],
        clock: Callable[[], float],
        name: str | None,
        window: int,
        spans: StepSpans | None = None,
    ) -> None:
        """Make a writer with at most `window` steps in flight. If `spans` is None, steps are not traced."""
        super().__init__(target, policy, on_wait, clock, name)
        check_whole("window", window, 1)
        self.closed = False
        self._window = window
        self._spans = spans
        self._pending: deque[PendingStep] = deque()  # in order; the first is step acknowledged.step + 1
        self._refused = 0  # the lowest number of a refused step that no acknowledged step has taken
        self._unanswered = 0  # the lowest number of a step that got no answer and may have been applied
        self._restoring = False
        self._steps_at_rate_0 = 0

    @property
    def in_flight(self) -> int:
        """The number of steps that are submitted but not yet acknowledged."""
        return len(self._pending)

    @property
    def _limit(self) -> int:
        """The most steps that may be in flight: the smaller of the client's and the server's window."""
        return min(self._window, self.limits.window)

    def restore(self, name: str, *, expected_step: int | None = None) -> Operation[results.RestoreResult]:
        """Restore a checkpoint as the start of a new lineage, and continue from there as its writer.

        name: The checkpoint's name.
        expected_step: Raise WrongRunError if the run is at another step; None: restore at any step.

        Waits for the steps in flight first. Raises CheckpointError if there is no such checkpoint, or if it
        is damaged.
        """
        check_str("name", name)
        check_expected(expected_step=expected_step)
        yield Until(lambda: not self._restoring)
        self._restoring = True  # later steps wait
        try:
            yield Until(lambda: not self._pending)  # earlier steps belong to the old lineage
            request = pb.RestoreCheckpointRequest(
                request_id=new_id(),
                name=name,
                expected_lineage=self.acknowledged.session.lineage,
                expected_step=expected_step,
            )
            response = yield from self._ask("RestoreCheckpoint", lambda: request)
            yield from self.open(replace=True)  # the restore ended the old epoch
            self._refused = self._unanswered = 0
        finally:
            self._restoring = False
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def settle(self) -> Operation[None]:
        """Wait until no step is in flight. Every submitted step's future then has its result or error."""
        yield Until(lambda: not self._pending)

    def new_step(
        self, tokens: Any, step: int | None = None, /, **options: Unpack[StepOptions]
    ) -> PendingStep:
        """Make a step from a batch. `enter` later gives the step its position in the submission order."""
        if step is not None:
            check_whole("step", step, 1)
        request = codec.step_request(new_id(), tokens, self.model.num_tokens, **options)
        pending = PendingStep(request, step)
        self._check_size(pending.request)
        if self._spans is not None:
            pending.span = self._spans.begin()
        return pending

    def enter(self, pending: PendingStep) -> Operation[None]:
        """Append a step to the submission order once the window has room, and wait until it may be sent.

        Raises ConflictError if the step requires a number other than the one that its position gives.
        """
        if not self._has_room():
            yield Until(self._has_room)
        if self.closed:
            raise MaskwireError("this trainer is closed; connect again")
        self._check_number(pending, self.acknowledged.step + 1 + len(self._pending))
        pending.digest_version = self.acknowledged.digest_version
        self._pending.append(pending)
        if not self._sendable(pending):
            yield Until(partial(self._sendable, pending))

    def finish(self, pending: PendingStep) -> Operation[results.StepResult]:
        """Send a step after `enter`, and return its result once the step is durable and acknowledged."""
        if pending not in self._pending:
            raise MaskwireError("the step was interrupted before it was sent; submit it again")
        pending.started = True
        try:
            if pending.answer is None:
                pending.answer = yield from self._ask(
                    "TrainStep", partial(self._send, pending), order=_Order(self, pending)
                )
            if self._pending[0] is not pending:
                yield Until(lambda: self._pending[0] is pending)
            answer = pending.answer
            if self._unanswered and answer.step > self.acknowledged.step + 1:
                raise self._unknown_outcome()
            position = self.acknowledged.next_position(answer, pending.payload_hash())
            self.acknowledged.position = position
            self._pending.popleft()  # CPython delivers no signal between these two lines
        except Exception as error:
            self._leave(pending, error)
            if isinstance(error, UnavailableError) and pending.request.step:
                self._unanswered = min(self._unanswered or pending.request.step, pending.request.step)
            elif self._unanswered and error.__class__ is ConflictError:
                raise self._unknown_outcome() from error
            raise
        if self.acknowledged.step >= self._unanswered:
            self._unanswered = 0  # another step has that number now
        if pending.span is not None:
            pending.span.end(answer.step)
        self._warn_at_rate_0(pending.request, answer)
        return codec.read_step(answer)

    def _unknown_outcome(self) -> UnavailableError:
        return UnavailableError(
            f"step {self._unanswered} got no answer and may have been applied, so this client cannot check "
            "later steps: connect again to continue from the server's step",
            reason="UNAVAILABLE",
        )

    def withdraw(self, pending: PendingStep) -> bool:
        """Remove a step from the submission order, unless it may have been sent.

        Returns False if it may have been sent: the caller must then call `finish`.
        """
        if pending not in self._pending:
            return True
        if pending.started:
            return False
        self._leave(pending)
        return True

    def _leave(self, pending: PendingStep, error: Exception | None = None) -> None:
        """Remove a step from the submission order, so that the next step gets its number."""
        if pending.span is not None:
            pending.span.fail("not sent" if error is None else getattr(error, "reason", type(error).__name__))
        number = self._number_of(pending)
        self._refused = min(number, self._refused) if self._refused > self.acknowledged.step else number
        self._pending.remove(pending)

    def _send(self, pending: PendingStep) -> pb.TrainStepRequest:
        """Return a step's request with its current number, and record that the step is in flight."""
        number = self._number_in_flight(pending)
        if not number:
            number = self._number_of(pending)
            self._check_number(pending, number)
        session = self.acknowledged.session
        pending.request.session.CopyFrom(session)
        pending.request.step = number
        pending.sent_number, pending.sent_epoch = number, session.epoch
        pending.acknowledged_when_sent = self.acknowledged.step
        return pending.request

    def _check_number(self, pending: PendingStep, number: int) -> None:
        if pending.required_number not in (None, number):
            raise ConflictError(
                f"this is the batch of step {pending.required_number}, but the run's next step is {number}: "
                "submit the batch of the next step. If an earlier step was refused, its error says why",
                reason="GAP",
                metadata={"step": str(pending.required_number), "expected_step": str(number)},
            )

    def _has_room(self) -> bool:
        """Whether another step may enter the window. True if the writer is closed: `enter` then raises."""
        return self.closed or (len(self._pending) < self._limit and not self._restoring)

    def _number_in_flight(self, pending: PendingStep) -> int:
        """Return the number of a step's attempt that may still be in flight in this session; 0 if none is.

        An interrupted attempt is repeated under the same number, even if the step's number has changed since,
        because the server may still have the first attempt, and then answers both.
        """
        return pending.sent_number if pending.sent_epoch == self.acknowledged.session.epoch else 0

    def _number_of(self, pending: PendingStep) -> int:
        """Return the number that a step's position in the submission order gives it."""
        return self.acknowledged.step + 1 + self._pending.index(pending)

    def _sendable(self, pending: PendingStep) -> bool:
        """Whether a step can be sent. An interrupted step always can, because it repeats its attempt.

        When a step is refused, the next step takes its number, and so on for all later steps. No step is sent
        until the server has answered the steps that are in flight under their old numbers, because two steps
        could arrive under one number. The step that takes the refused number must also be acknowledged before
        later steps are sent: the server refuses steps that arrive before it.
        """
        if self._number_in_flight(pending):
            return True
        for number, other in enumerate(self._pending, self.acknowledged.step + 1):
            if self._number_in_flight(other) not in (0, number):
                return False
        return not self.acknowledged.step < self._refused < self._number_of(pending)

    def _check_size(self, request: pb.TrainStepRequest) -> None:
        # Checked here, because gRPC would reject the message without saying what to do.
        limit = self.limits.max_message_bytes
        rows, columns = request.batch.shape
        if not limit or rows * (columns + 1) * _MAX_ID_BYTES + _MAX_OTHER_BYTES <= limit:
            return  # computing the exact size encodes the message, which takes as long as sending it
        request.session.CopyFrom(self.acknowledged.session)
        if (size := request.ByteSize() + _NUMBER_BYTES) > limit:
            raise too_long("the batch", size, limit, "send fewer rows")

    def _warn_at_rate_0(self, request: pb.TrainStepRequest, response: pb.TrainStepResponse) -> None:
        """Warn once that the learning-rate schedule has ended, so that later steps do not change weights."""
        applied = response.outcome == pb.STEP_OUTCOME_APPLIED and response.HasField("metrics")
        if not applied or response.replayed or response.metrics.learning_rate:
            return
        if request.HasField("learning_rate"):
            return
        self._steps_at_rate_0 += 1
        if self._steps_at_rate_0 == 2:  # the first such step is the last step of the schedule
            log.warning(
                "the learning rate is 0 at step %d: steps from here on do not change the weights. Stop, or "
                "start the server with a larger optimizer.total_steps or a min_learning_rate above 0, or "
                "give each step its learning_rate",
                response.step,
            )


class _Order:
    """Determines when each attempt of one step may be sent, so that steps are sent in order."""

    def __init__(self, writer: Writer, pending: PendingStep) -> None:
        self._writer, self._pending = writer, pending

    def compute_hash(self) -> None:
        """Hash the step's payload. Ignores an id that cannot be hashed, because the server refuses it."""
        with contextlib.suppress(ValueError):
            self._pending.payload_hash()

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata with the context of the step's trace; empty if the step is not traced."""
        return () if self._pending.span is None else self._pending.span.headers

    def before_attempt(self, began: float) -> Operation[None]:
        """Wait until the step can be sent. If the server was unreachable, confirm the session first."""
        while True:
            yield from self._writer._confirm(began)
            if self._writer._sendable(self._pending):
                return
            yield Until(partial(self._writer._sendable, self._pending))

    def after_attempt(self) -> None:
        """Record that the step is no longer in flight."""
        self._pending.sent_number = 0

    def can_resend_now(self, error: MaskwireError) -> Operation[bool]:
        """Whether to send the refused step again at once, under its new number.

        True if the server expects an earlier step that was in flight when this step was sent. A server that
        expects an acknowledged step, or reports GAP for a step without steps before it, may have another
        history; for such errors the session is opened again, which checks the history.
        """
        pending, writer = self._pending, self._writer
        if error.reason == "GAP":
            yield Pause(_RENUMBER_WAIT)  # the answer that refused the earlier step may not have arrived yet
            expected = int(error.metadata.get("expected_step", 0))
            if pending.acknowledged_when_sent < expected < pending.request.step:
                return True
        if error.reason in _FOREIGN_HISTORY:
            yield from writer.open()
        return False
