"""The protocol without I/O: what to send, what an answer means, when to ask again.

A conversation is a generator. It yields what is to be done, a `Call`, a `Pause` or a wait `Until`
something holds, and is sent what came of it; its return value is the caller's. The blocking and the
asyncio client differ only in how they do these three. Whoever drives conversations lets one of them run
at a time between two yields, so that nothing here needs a lock, and nothing here knows a channel or a
thread.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from maskwire import messages, results
from maskwire.download import Progress, Target
from maskwire.errors import (
    CheckpointError,
    DigestMismatchError,
    Failure,
    FencedError,
    MaskwireError,
    UnavailableError,
)
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import step_digest

T = TypeVar("T")
_RENUMBER_WAIT = 0.02


@dataclass(frozen=True)
class Call:
    """Call a method of the service; send the answer back, or the `Failure`."""

    method: str
    request: Any
    timeout: float
    take: Callable[[Any], None] | None = None
    """Of a stream: called with each message; the answer is then None."""


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Until:
    """Wait until this holds; other conversations change it."""

    holds: Callable[[], bool]


Effect = Call | Pause | Until
Talk = Generator[Effect, Any, T]


class StepOptions(TypedDict, total=False):
    """What a step may be told beside its tokens."""

    lengths: Any
    """Integers [rows]: what lies behind a row's length is padding."""
    prompt_mask: Any
    """bool [rows, columns]: True where a position is given and never masked."""
    only_train_generator: bool
    """Compute and train the generator alone."""
    only_train_critic: bool
    """Train the critic alone."""
    generator_sample_temperature: float | None
    """Of the critic's input, 0 for the most probable token; None: drawn from [0, 1) for each step."""
    learning_rate: float | None
    """Of this step, in place of the schedule's."""


class EvalOptions(TypedDict, total=False):
    """What an evaluation may be told beside its tokens."""

    lengths: Any
    """Integers [rows]: what lies behind a row's length is padding."""
    prompt_mask: Any
    """bool [rows, columns]: True where a position is given and never masked."""
    row_ids: Sequence[int]
    """They seed the rows' draws: the same id, seed and draws give the same result in any batch."""
    draws: int
    """Draws a row, 0 for 16."""
    seed: int
    """Of the draws."""
    only_train_generator: bool
    """Losses as with the same flag in training."""
    only_train_critic: bool
    """Losses as with the same flag in training."""
    generator_sample_temperature: float | None
    """As in training; None: drawn, from the evaluation's seed."""
    raw_weights: bool
    """Evaluate the trained weights even when a moving average is kept."""
    text_bytes: int | None
    """Bytes of text that the batch encodes, to get bits per byte."""


@dataclass(frozen=True)
class RetryPolicy:
    """When to ask again."""

    retry_for: float = 300.0
    """Seconds to go on asking a server that does not answer."""
    first_wait: float = 0.05
    longest_wait: float = 1.0
    attempt_timeout: float = 60.0
    """The deadline of one attempt, in seconds."""


def new_id() -> str:
    """A request id or nonce."""
    return uuid.uuid4().hex


def wait_before_retry(
    failure: Failure,
    attempt: int,
    elapsed: float,
    policy: RetryPolicy,
    jitter: Callable[[], float] = random.random,
) -> float | None:
    """Seconds to wait before attempt number `attempt` + 1, or None to give up.

    Exponential, capped, and multiplied by a random number in [0.5, 1), so that many clients of a
    server that came back do not ask at once.
    """
    if not failure.retryable or elapsed >= policy.retry_for:
        return None
    wait = min(
        policy.longest_wait, max(policy.first_wait * 2.0 ** min(attempt, 30), failure.retry_after or 0.0)
    )
    return wait * (0.5 + jitter() / 2)


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


class Asking:
    """Conversations that need no session: each asks until there is an answer."""

    def __init__(
        self, target: str, policy: RetryPolicy, on_wait: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.target = target
        self._policy = policy
        self._on_wait = on_wait
        self._clock = clock

    def eval_loss(self, tokens: Any, **options: Unpack[EvalOptions]) -> Talk[results.EvalResult]:
        """Evaluate one batch."""
        request = messages.eval_request(tokens, **options)
        return messages.read_eval((yield from self._ask("EvalLoss", lambda: request)))

    def checkpoint(self, name: str, labels: Mapping[str, str] | None) -> Talk[results.CheckpointInfo]:
        """Save a checkpoint."""
        request = pb.CheckpointRequest(request_id=new_id(), name=name, labels=labels)
        response = yield from self._ask("Checkpoint", lambda: request)
        return messages.read_checkpoint(response.checkpoint)

    def checkpoints(self) -> Talk[list[results.CheckpointInfo]]:
        """List the checkpoints, newest first."""
        found: list[results.CheckpointInfo] = []
        request = pb.ListCheckpointsRequest()
        while True:
            response = yield from self._ask("ListCheckpoints", lambda: request)
            found += [messages.read_checkpoint(info) for info in response.checkpoints]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def restore(self, name: str, expected_step: int | None) -> Talk[results.RestoreResult]:
        """Go back to a checkpoint."""
        request = pb.RestoreCheckpointRequest(request_id=new_id(), name=name, expected_step=expected_step)
        response = yield from self._ask("RestoreCheckpoint", lambda: request)
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def download(
        self, name: str, folder: Path, *, weights: bool, ema: bool, on_progress: Progress | None
    ) -> Talk[Path]:
        """Fetch a checkpoint's files, each from where an earlier attempt ended."""
        info = next((info for info in (yield from self.checkpoints()) if info.name == name), None)
        if info is None:  # the server says it best
            request = pb.DownloadCheckpointRequest(name=name)
            yield from self._ask("DownloadCheckpoint", lambda: request, take=lambda _: None)
            raise UnavailableError(f"checkpoint {name!r} was saved this moment; ask again")
        target = Target(info, folder, weights=weights, ema=ema, on_progress=on_progress)
        for part in target.missing():
            while not part.whole:
                place = part.size
                yield from self._ask("DownloadCheckpoint", part.request, take=part.take, moved=part.here)
                if part.size == place:
                    raise CheckpointError(f"{self.target} sent nothing more of {part.name}; download again")
        return target.folder

    def status(self) -> Talk[results.Status]:
        """Is it stuck or working?"""
        return messages.read_status((yield from self._ask("GetStatus", pb.GetStatusRequest)))

    def _before(self) -> Talk[None]:
        """What an attempt of a step needs done first."""
        yield from ()

    def _lost(self) -> None:
        """The server could not be reached; it may have been restarted."""

    def _again(self, error: MaskwireError, acknowledged: int) -> Talk[bool]:  # noqa: ARG002
        """Whether a refused step is to be sent again at once."""
        yield from ()
        return False

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return 0

    def _ask(
        self,
        method: str,
        make: Callable[[], Any],
        *,
        steps: bool = False,
        take: Callable[[Any], None] | None = None,
        moved: Callable[[], int] = lambda: 0,
    ) -> Talk[Any]:
        """Ask until there is an answer, or an error that asking again does not help.

        `moved` tells how far a stream has come: one that comes further is not given up.
        """
        began, attempt, told = self._clock(), 0, ""
        while True:
            if steps:
                yield from self._before()
            acknowledged, place = self.step, moved()
            reply = yield Call(method, make(), self._policy.attempt_timeout, take)
            if not isinstance(reply, Failure):
                return reply
            error = reply.error
            if steps and (yield from self._again(error, acknowledged)):
                continue
            if moved() != place:
                began, attempt = self._clock(), 0
            elapsed = self._clock() - began
            wait = wait_before_retry(reply, attempt, elapsed, self._policy)
            if wait is None:
                if reply.retryable:
                    raise UnavailableError(
                        f"{self.target} did not answer for {elapsed:.0f} s ({error}); is the server running "
                        "and the address right? `maskwire status` tells",
                        reason=error.reason,
                        metadata=error.metadata,
                    )
                raise error
            if reply.unreachable:
                self._lost()
            message = f"waiting for {self.target}: {error}"
            if attempt and message != told:  # the first failure is often the last
                self._on_wait(message)
                told = message
            attempt += 1
            yield Pause(wait)


class Pending:
    """A step that was handed in and not acknowledged yet."""

    def __init__(self, request: pb.TrainStepRequest) -> None:
        self.request = request
        self.payload = messages.hash_of(request)


class Writing(Asking):
    """The run's writer: a session, steps in flight in order, and the proof of what was trained."""

    def __init__(
        self,
        target: str,
        policy: RetryPolicy,
        on_wait: Callable[[str], None],
        clock: Callable[[], float],
        *,
        name: str,
        window: int,
    ) -> None:
        super().__init__(target, policy, on_wait, clock)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.name = name
        self.ledger = Ledger()
        self.model: results.ModelInfo
        self.limits: results.Limits
        self.tokenizer = ""
        self.closed = False
        self._window = window
        self._nonce = new_id()
        self._pending: deque[Pending] = deque()  # in order; the first is step ledger.step + 1
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

    def open(self, *, takeover: bool = False, tokenizer: str = "") -> Talk[None]:
        """Become the run's writer, or confirm that this is it, and that the server has our history."""
        request = pb.OpenSessionRequest(
            client_name=self.name,
            nonce=self._nonce,
            takeover=takeover,
            held_epoch=self.ledger.session.epoch or None,
            history=self.ledger.history(),
            tokenizer=tokenizer,
        )
        response = yield from self._ask("OpenSession", lambda: request)
        if not self.ledger.digest:
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

    def enter(self, request: pb.TrainStepRequest) -> Talk[Pending]:
        """Take a step's place in the order, once the window has room."""
        pending = Pending(request)
        yield Until(lambda: self.closed or len(self._pending) < self._window)
        if self.closed:
            raise MaskwireError("this trainer is closed; connect again")
        self._pending.append(pending)
        return pending

    def finish(self, pending: Pending) -> Talk[results.StepResult]:
        """Have a step trained that has its place; its result once it is durable."""
        try:
            response = yield from self._ask("TrainStep", lambda: self._numbered(pending), steps=True)
            # Answers are checked in order: each digest builds on the one before.
            yield Until(lambda: self._pending[0] is pending)
            self.ledger.acknowledge(response, pending.payload)
            return messages.read_step(response)
        finally:
            # A step that was refused leaves its number to the one behind it.
            self._pending.remove(pending)

    def _numbered(self, pending: Pending) -> pb.TrainStepRequest:
        pending.request.session.CopyFrom(self.ledger.session)
        pending.request.step = self.ledger.step + 1 + self._pending.index(pending)
        return pending.request

    def restore(self, name: str, expected_step: int | None) -> Talk[results.RestoreResult]:
        """Go back to a checkpoint, and go on from there as the new lineage's writer."""
        request = pb.RestoreCheckpointRequest(
            request_id=new_id(),
            name=name,
            expected_lineage=self.ledger.session.lineage,
            expected_step=expected_step,
        )
        response = yield from self._ask("RestoreCheckpoint", lambda: request)
        self._nonce = new_id()  # the restore used the old epoch up
        self.ledger = Ledger()
        yield from self.open()
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def farewell(self) -> pb.CloseSessionRequest | None:
        """What ends the session, if there is one."""
        return pb.CloseSessionRequest(session=self.ledger.session) if self.ledger.digest else None

    def _before(self) -> Talk[None]:
        """After the server was out of reach: it must still have what it acknowledged."""
        if not self._stale:
            return
        yield Until(lambda: not self._reopening)
        if self._stale:
            self._reopening = True
            try:
                yield from self.open()
                self._stale = False
            finally:
                self._reopening = False

    def _lost(self) -> None:
        self._stale = True

    def _again(self, error: MaskwireError, acknowledged: int) -> Talk[bool]:
        """Whether a step that was ahead of its turn can be numbered again.

        So it can while the server expects one of the steps that were in flight: a server that expects
        less than was `acknowledged` when the step was sent, or more, has another history.
        """
        if error.reason != "GAP":
            return False
        yield Pause(_RENUMBER_WAIT)  # the refusal of the step before it may still be on its way to us
        expected = int(error.metadata.get("expected_step", 0))
        return acknowledged < expected <= self.ledger.step + len(self._pending)
