"""The run's writer, as conversations: a session, steps in order, and the proof of what was trained."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from maskwire import results
from maskwire.arguments import check_whole
from maskwire.errors import (
    ConflictError,
    DigestMismatchError,
    FencedError,
    MaskwireError,
    WriterPresentError,
)
from maskwire.process import default_name, holder_of, is_gone, this_process
from maskwire.protocol import codec
from maskwire.protocol.calls import Asking, Pause, RetryPolicy, Talk, Until, new_id
from maskwire.protocol.limits import too_long
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import VERSIONS, DigestVersion, step_digest

log = logging.getLogger(__name__)

_RENUMBER_WAIT = 0.02
_NUMBER = 12  # bytes that a step's number takes at most
_OTHER_HISTORY = {"GAP", "UNKNOWN_EPOCH", "WRONG_RUN"}  # a server of another history says so too


@dataclass
class Ledger:
    """What was acknowledged: the session, the last step, and the digest chain that proves it."""

    session: pb.SessionRef = field(default_factory=pb.SessionRef)
    step: int = 0
    digest: bytes = b""
    digest_version: DigestVersion = field(default_factory=partial(DigestVersion, 1))
    """How the session's payloads are hashed."""

    def open(self, response: pb.OpenSessionResponse) -> None:
        """Begin where the server is."""
        self.session = response.session
        self.step, self.digest = response.durable_step, response.digest
        # A server of version 0.1 says 0.
        self.digest_version = DigestVersion(response.digest_version or 1, response.model.num_tokens)

    def history(self) -> pb.History | None:
        """What the server must still have."""
        if not self.digest:
            return None
        return pb.History(
            run_id=self.session.run_id, lineage=self.session.lineage, step=self.step, digest=self.digest
        )

    def acknowledge(self, response: pb.TrainStepResponse, payload: bytes) -> None:
        """Extend the chain by an answer; raises DigestMismatchError if it is not of what was sent."""
        if response.step != self.step + 1:
            raise DigestMismatchError(
                f"the server answered with step {response.step}, expected was {self.step + 1}; stop"
            )
        expected = step_digest(self.digest, self.session.lineage, response.step, payload, response.outcome)
        if response.digest != expected:
            raise DigestMismatchError(
                f"the server's digest after step {response.step} is {response.digest.hex()[:16]}…, what this "
                f"client sent gives {expected.hex()[:16]}…: their histories differ; stop"
            )
        self.step, self.digest = response.step, response.digest


class Pending:
    """A step that was handed in and not acknowledged yet: its turn in the order."""

    def __init__(self, writing: Writing, request: pb.TrainStepRequest, step: int | None) -> None:
        self._writing = writing
        self._request = request
        self._step = step  # the number that it must have; None: the one that its place gives it
        self._acknowledged = 0  # the last step that was, when it was sent
        self.sent = 0
        """The number under which it is on its way; 0: it is not."""

    @cached_property
    def payload(self) -> bytes:
        """The payload hash."""
        return codec.hash_of(self._request, self._writing.ledger.digest_version)

    def numbered(self) -> pb.TrainStepRequest:
        """The request with the number that its place gives it."""
        number = self._writing.number_of(self)
        if self._step not in (None, number):
            raise ConflictError(
                f"this is the batch of step {self._step}, and the run's next is step {number}: a step "
                "before it was refused",
                reason="GAP",
                metadata={"step": str(self._step), "expected_step": str(number)},
            )
        self._request.session.CopyFrom(self._writing.ledger.session)
        self._request.step = number
        return self._request

    def send(self) -> pb.TrainStepRequest:
        """The request, on its way from here on."""
        request = self.numbered()
        self.sent, self._acknowledged = request.step, self._writing.step
        return request

    def before(self, began: float) -> Talk[None]:
        """The server must still have what it acknowledged, and what was refused must be made good."""
        ready = partial(self._writing.ready, self)
        while True:
            yield from self._writing.confirm(began)
            if ready():
                return
            yield Until(ready)

    def answered(self) -> None:
        """It is on its way no longer."""
        self.sent = 0

    def again(self, error: MaskwireError) -> Talk[bool]:
        """Whether it can be numbered again.

        So it can if the server expects one of the steps before it that were in flight when it was sent.
        One that expects a step which was acknowledged has another history, or says GAP to a step that
        must not be there: OpenSession tells.
        """
        writing = self._writing
        if error.reason == "GAP":
            yield Pause(_RENUMBER_WAIT)  # the refusal of the step before may still be on its way to us
            expected = int(error.metadata.get("expected_step", 0))
            if self._acknowledged < expected < self._request.step:
                return True
        if error.reason in _OTHER_HISTORY:
            yield from writing.open()
        return False


class Writing(Asking):
    """The run's writer: a session, steps in flight in order, and the proof of what was trained."""

    def __init__(
        self,
        target: str,
        policy: RetryPolicy,
        on_wait: Callable[[str], None],
        clock: Callable[[], float],
        name: str | None,
        window: int,
    ) -> None:
        super().__init__(target, policy, on_wait, clock)
        check_whole("window", window, 1)
        self.name = name or default_name()
        self.took_over = ""
        """Whose open session this one took over, in words; empty: nobody's."""
        self.ledger = Ledger()
        self.model: results.ModelInfo
        self.limits: results.Limits
        self.tokenizer = ""
        self.inexact_replays: tuple[results.InexactReplay, ...] = ()
        self.data: dict[str, str] = {}
        self.evaluated = (0, 0)
        self.closed = False
        self._window = window
        self._nonce = new_id()
        self._pending: deque[Pending] = deque()  # in order; the first is step ledger.step + 1
        self._refused = 0  # the first number that a refused step left and no acknowledged one has
        self._restoring = False
        self._stale = False  # the server may have been restarted since the session was confirmed
        self._reopening = False
        self._steps_at_rate_0 = 0

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self.ledger.step

    @property
    def in_flight(self) -> int:
        """Steps that were handed in and are not acknowledged."""
        return len(self._pending)

    @property
    def out_of_reach(self) -> bool:
        """The last attempt got no answer, and the session was not confirmed since."""
        return self._stale

    def open(
        self,
        *,
        takeover: bool = False,
        tokenizer: str = "",
        evaluated_step: int = 0,
        anew: bool = False,
        began: float | None = None,
        data: Mapping[str, str] | None = None,
        allow_changed_data: bool = False,
    ) -> Talk[None]:
        """Become the run's writer, or confirm that this is it, and that the server has our history.

        `anew`: another session than before, of a client that holds nothing.
        """
        nonce = new_id() if anew else self._nonce
        request = pb.OpenSessionRequest(
            client_name=self.name,
            nonce=nonce,
            takeover=takeover,
            held_epoch=None if anew else self.ledger.session.epoch or None,
            history=None if anew else self.ledger.history(),
            tokenizer=tokenizer,
            data=data,
            allow_changed_data=allow_changed_data,
            process=this_process(),
            evaluated_step=evaluated_step,
            digest_versions=VERSIONS,
        )
        response = yield from self._open(request, began)
        if response.HasField("superseded"):
            self.took_over = _took_over(response.superseded, request)
        if anew or not self.ledger.digest:
            self._nonce = nonce
            self._refused = 0
            self.ledger = Ledger()
            self.ledger.open(response)
        elif response.session.epoch != self.ledger.session.epoch:
            raise FencedError(
                f"the session's epoch {self.ledger.session.epoch} was replaced by "
                f"{response.session.epoch}; connect again",
                reason="FENCED",
            )
        self.model = codec.read_model(response.model)
        self.limits = codec.read_limits(response.limits)
        self.tokenizer = response.tokenizer
        self.inexact_replays = codec.read_inexact_replays(response.inexact_replays)
        self.data = dict(response.data)
        self.evaluated = (response.evaluated_lineage, response.evaluated_step)
        self._window = min(self._window, self.limits.window)

    def _open(self, request: pb.OpenSessionRequest, began: float | None) -> Talk[pb.OpenSessionResponse]:
        """Ask for the session, also for that of another process which is gone."""
        while True:
            try:
                response: pb.OpenSessionResponse = yield from self._ask(
                    "OpenSession", lambda: request, began=began
                )
                return response
            except WriterPresentError as error:
                epoch = int(error.metadata.get("epoch", 0))
                if epoch <= request.gone_epoch or not is_gone(holder_of(error.metadata)):
                    raise
                request.gone_epoch = epoch

    def use_tokenizer(self, tokenizer: str) -> Talk[None]:
        """Keep with the run what its ids stand for."""
        if tokenizer and tokenizer != self.tokenizer:
            yield from self.open(tokenizer=tokenizer)

    def use_data(self, fingerprint: Mapping[str, str], *, allow_changed: bool) -> Talk[None]:
        """Keep with the run what it is trained on."""
        if fingerprint and dict(fingerprint) != self.data:
            yield from self.open(data=fingerprint, allow_changed_data=allow_changed)

    def mark_evaluated(self) -> Talk[None]:
        """Keep with the run that the last acknowledged step is evaluated."""
        yield from self.open(evaluated_step=self.step)

    def settle(self) -> Talk[None]:
        """Wait until no step is in flight."""
        yield Until(lambda: not self._pending)

    def train(self, request: pb.TrainStepRequest, step: int | None = None) -> Talk[results.StepResult]:
        """Have a step trained in its turn; its result once it is durable.

        The step has its place in the order once the conversation yields what is no `Until`. With `step` it
        is trained as that one or not at all: ConflictError if its place has another number.
        """
        if step is not None:
            check_whole("step", step, 1)
        self._check_size(request)
        pending = Pending(self, request, step)
        yield Until(lambda: self.closed or (len(self._pending) < self._window and not self._restoring))
        if self.closed:
            raise MaskwireError("this trainer is closed; connect again")
        self._pending.append(pending)
        try:
            pending.numbered()  # what cannot be trained in its place is refused before anything is asked
            response = yield from self._ask("TrainStep", pending.send, turn=pending)
            # Answers are checked in order: each digest builds on the one before.
            yield Until(lambda: self._pending[0] is pending)
            self.ledger.acknowledge(response, pending.payload)
            self._tell_rate(request, response)
            return codec.read_step(response)
        except BaseException:
            # It leaves its number to the one behind it.
            number = self.number_of(pending)
            self._refused = min(number, self._refused) if self._refused > self.step else number
            raise
        finally:
            self._pending.remove(pending)

    def _tell_rate(self, request: pb.TrainStepRequest, response: pb.TrainStepResponse) -> None:
        """Say once that the schedule has ended: every step behind its last costs time for nothing."""
        applied = response.outcome == pb.STEP_OUTCOME_APPLIED and response.HasField("metrics")
        if not applied or response.replayed or response.metrics.learning_rate:
            return
        if request.HasField("learning_rate"):
            return
        self._steps_at_rate_0 += 1
        if self._steps_at_rate_0 == 2:  # the first is the schedule's own last step
            log.warning(
                "the learning rate is 0 at step %d: steps from here on do not change the weights. Stop, or "
                "start the server with a larger optimizer.total_steps or a min_learning_rate above 0, or "
                "give each step its learning_rate",
                response.step,
            )

    def _check_size(self, request: pb.TrainStepRequest) -> None:
        # The transport would refuse it before the server could tell what is behind it.
        request.session.CopyFrom(self.ledger.session)
        size, limit = request.ByteSize() + _NUMBER, self.limits.max_message_bytes
        if limit and size > limit:
            raise too_long("the batch", size, limit, "send fewer rows")

    def number_of(self, pending: Pending) -> int:
        """The number that its place gives a step."""
        return self.ledger.step + 1 + self._pending.index(pending)

    def ready(self, pending: Pending) -> bool:
        """Whether a step can be sent.

        After a refusal the server must have answered whatever is on its way under a number that is no
        longer its own, or two steps could meet there under one; and what takes the refused one's place
        must be acknowledged before what is behind it is sent: the server remembers one missing number.
        """
        if any(other.sent not in (0, number) for number, other in enumerate(self._pending, self.step + 1)):
            return False
        return not self.step < self._refused < self.number_of(pending)

    def restore(self, name: str, expected_step: int | None) -> Talk[results.RestoreResult]:
        """Go back to a checkpoint, and go on from there as the new lineage's writer."""
        yield Until(lambda: not self._restoring)
        self._restoring = True  # later steps wait
        try:
            yield Until(lambda: not self._pending)  # earlier ones belong to the old lineage
            request = pb.RestoreCheckpointRequest(
                request_id=new_id(),
                name=name,
                expected_lineage=self.ledger.session.lineage,
                expected_step=expected_step,
            )
            response = yield from self._ask("RestoreCheckpoint", lambda: request)
            yield from self.open(anew=True)  # the restore used the old epoch up
        finally:
            self._restoring = False
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def farewell(self) -> pb.CloseSessionRequest | None:
        """What ends the session, if there is one."""
        return pb.CloseSessionRequest(session=self.ledger.session) if self.ledger.digest else None

    def confirm(self, began: float) -> Talk[None]:
        """After the server was out of reach: it must still have what it acknowledged."""
        if not self._stale:
            return
        yield Until(lambda: not self._reopening)
        if self._stale:
            self._reopening = True
            try:
                yield from self.open(began=began)
                self._stale = False
            finally:
                self._reopening = False

    def _lost(self) -> None:
        self._stale = True


def _took_over(holder: pb.SessionHolder, request: pb.OpenSessionRequest) -> str:
    process = holder.process
    where = f" (host {process.host}, process {process.process_id})" if holder.HasField("process") else ""
    gone = ", a process that is gone" if holder.epoch == request.gone_epoch else ""
    return f"took over the session of {holder.client_name!r}{where}{gone}"


class Position:
    """What a trainer knows of its run."""

    _writing: Writing

    @property
    def name(self) -> str:
        """This job's name."""
        return self._writing.name

    @property
    def model(self) -> results.ModelInfo:
        """What is served."""
        return self._writing.model

    @property
    def inexact_replays(self) -> tuple[results.InexactReplay, ...]:
        """Steps that a start of the server computed again with results that were only close."""
        return self._writing.inexact_replays

    @property
    def limits(self) -> results.Limits:
        """The server's bounds on one request."""
        return self._writing.limits

    @property
    def run_id(self) -> str:
        """The run."""
        return self._writing.ledger.session.run_id

    @property
    def lineage(self) -> int:
        """One more after each restore."""
        return self._writing.ledger.session.lineage

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self._writing.ledger.step

    @property
    def evaluated(self) -> tuple[int, int]:
        """Lineage and number of the last step that a writer marked as evaluated; zeros: none."""
        return self._writing.evaluated

    @property
    def digest(self) -> bytes:
        """The digest after it: the same on both sides."""
        return self._writing.ledger.digest
