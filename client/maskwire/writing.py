"""The run's writer, as conversations: a session, steps in order, and the proof of what was trained."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from maskwire import messages, results
from maskwire.errors import ConflictError, DigestMismatchError, FencedError, MaskwireError
from maskwire.protocol import Asking, Pause, RetryPolicy, Talk, Until, new_id
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import step_digest

_RENUMBER_WAIT = 0.02
_OTHER_HISTORY = {"GAP", "UNKNOWN_EPOCH", "WRONG_RUN"}  # a server of another history says so too


@dataclass
class Ledger:
    """What was acknowledged: the session, the last step, and the digest chain that proves it."""

    session: pb.SessionRef = field(default_factory=pb.SessionRef)
    step: int = 0
    digest: bytes = b""

    def open(self, response: pb.OpenSessionResponse) -> None:
        """Begin where the server is."""
        self.session = response.session
        self.step, self.digest = response.durable_step, response.digest

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
    """A step that was handed in and not acknowledged yet."""

    def __init__(self, request: pb.TrainStepRequest, step: int | None) -> None:
        self.request = request
        self.step = step
        """The number that it must have; None: the one that its place gives it."""
        self.payload = messages.hash_of(request)


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
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.ledger = Ledger()
        self.model: results.ModelInfo
        self.limits: results.Limits
        self.tokenizer = ""
        self.closed = False
        self._window = window
        self._nonce = new_id()
        self._pending: deque[Pending] = deque()  # in order; the first is step ledger.step + 1
        self._restoring = False
        self._stale = False  # the server may have been restarted since the session was confirmed
        self._reopening = False

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self.ledger.step

    @property
    def in_flight(self) -> int:
        """Steps that were handed in and are not acknowledged."""
        return len(self._pending)

    def open(
        self, *, takeover: bool = False, tokenizer: str = "", anew: bool = False, began: float | None = None
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
        )
        response = yield from self._ask("OpenSession", lambda: request, began=began)
        if anew or not self.ledger.digest:
            self._nonce = nonce
            self.ledger = Ledger()
            self.ledger.open(response)
        elif response.session.epoch != self.ledger.session.epoch:
            raise FencedError(
                f"the session's epoch {self.ledger.session.epoch} was replaced by "
                f"{response.session.epoch}; connect again",
                reason="FENCED",
            )
        self.model = messages.read_model(response.model)
        self.limits = messages.read_limits(response.limits)
        self.tokenizer = response.tokenizer
        self._window = min(self._window, self.limits.window)

    def use_tokenizer(self, tokenizer: str) -> Talk[None]:
        """Keep with the run what its ids stand for."""
        if tokenizer and tokenizer != self.tokenizer:
            yield from self.open(tokenizer=tokenizer)

    def settle(self) -> Talk[None]:
        """Wait until no step is in flight."""
        yield Until(lambda: not self._pending)

    def train(self, request: pb.TrainStepRequest, step: int | None = None) -> Talk[results.StepResult]:
        """Have a step trained in its turn; its result once it is durable.

        The step has its place in the order from the first effect that is no `Until`. With `step` it is
        trained as that one or not at all: ConflictError if its place has another number.
        """
        pending = Pending(request, step)
        yield Until(lambda: self.closed or (len(self._pending) < self._window and not self._restoring))
        if self.closed:
            raise MaskwireError("this trainer is closed; connect again")
        self._pending.append(pending)
        try:
            self._numbered(pending)  # what cannot be trained in its place is refused before anything is asked
            response = yield from self._ask("TrainStep", lambda: self._numbered(pending), steps=True)
            # Answers are checked in order: each digest builds on the one before.
            yield Until(lambda: self._pending[0] is pending)
            self.ledger.acknowledge(response, pending.payload)
            return messages.read_step(response)
        finally:
            # A step that was refused leaves its number to the one behind it.
            self._pending.remove(pending)

    def _numbered(self, pending: Pending) -> pb.TrainStepRequest:
        number = self.ledger.step + 1 + self._pending.index(pending)
        if pending.step not in (None, number):
            raise ConflictError(
                f"this is the batch of step {pending.step}, and the run's next is step {number}: a step "
                "before it was refused",
                reason="GAP",
                metadata={"step": str(pending.step), "expected_step": str(number)},
            )
        pending.request.session.CopyFrom(self.ledger.session)
        pending.request.step = number
        return pending.request

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

    def _before(self, began: float) -> Talk[None]:
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

    def _again(self, error: MaskwireError, acknowledged: int) -> Talk[bool]:
        """Whether a step that was refused can be numbered again.

        So it can while the server expects one of the steps that were in flight: a server that expects
        less than was `acknowledged` when the step was sent, or more, has another history. Of one that
        may, OpenSession tells whether it does.
        """
        if error.reason == "GAP":
            yield Pause(_RENUMBER_WAIT)  # the refusal of the step before it may still be on its way to us
            expected = int(error.metadata.get("expected_step", 0))
            if acknowledged < expected <= self.ledger.step + len(self._pending):
                return True
        if error.reason in _OTHER_HISTORY:
            yield from self.open()
        return False


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
    def digest(self) -> bytes:
        """The digest after it: the same on both sides."""
        return self._writing.ledger.digest
