"""The protocol without I/O: what to send, what an answer means, when to ask again.

A conversation is a generator. It yields what is to be done, a `Call`, a `Pause`, some `Work` with files or
a wait `Until` something holds, and is sent what came of it; its return value is the caller's. The blocking
and the asyncio client differ only in how they do these. Whoever drives conversations lets one of them run
at a time between two yields, so that nothing here needs a lock, and nothing here knows a channel or a
thread.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack

from maskwire import arguments, results
from maskwire.errors import CheckpointError, Failure, MaskwireError, UnavailableError
from maskwire.protocol import codec
from maskwire.protocol import evaluation as evaluations
from maskwire.protocol import generation as generations
from maskwire.protocol.download import Progress, Target
from maskwire.protocol.limits import Bounds
from maskwire.v1 import training_service_pb2 as pb

T = TypeVar("T")

_LONGEST = 1e7  # seconds; gRPC takes no infinite deadline
_SLOW = {"EvalLoss", "Checkpoint", "RestoreCheckpoint"}  # begun anew when broken off, so given time
_ADVICE = re.compile(r"; (?:ask again|retry)(?: with the same request id)?$")
_QUICK = {"GetStatus", "ListCheckpoints", "ListSteps"}  # answered at once or not at all


@dataclass(frozen=True)
class Call:
    """Call a method of the service; send the answer back, or the `Failure`."""

    method: str
    request: Any
    timeout: float
    take: Callable[[Any], None] | None = None
    """Of a stream: called with each message; the answer is then None."""


@dataclass(eq=False)
class Stream:
    """A call whose answers `Next` asks for one at a time."""

    method: str
    request: Any
    timeout: float
    call: Any = None
    """Of whoever does the effects; None until it is begun."""

    def hang_up(self) -> None:
        """Nobody wants another message: the server is told."""
        if self.call is not None:
            self.call.cancel()


@dataclass(frozen=True)
class Next:
    """Begin the stream if it is not; send back its next message, None behind the last, or the `Failure`."""

    stream: Stream


@dataclass(frozen=True)
class Give:
    """Hand this to whoever iterates over the conversation."""

    value: Any


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Until:
    """Wait until this holds; other conversations change it."""

    holds: Callable[[], bool]


@dataclass(frozen=True)
class Work:
    """Do this, which takes its time, and send back what it returns; others go on meanwhile."""

    act: Callable[[], Any]


Effect = Call | Next | Give | Pause | Work | Until
Talk = Generator[Effect, Any, T]


class Turn(Protocol):
    """What a call that has its place in an order does about each attempt."""

    def before(self, began: float) -> Talk[None]:
        """What is needed first, of a call that began to ask then."""

    def answered(self) -> None:
        """The attempt is over."""

    def again(self, error: MaskwireError) -> Talk[bool]:
        """Whether a refused one is to be sent again at once."""


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
    """Draws a row, 0 for 16, or fewer where the server takes fewer; by the chain rule orders, 0 for 1."""
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
    estimator: Literal["systematic", "chain_rule"]
    """The negative ELBO by systematic draws, or the exact likelihood under an order, a pass a token."""
    chain_order: Literal["left_to_right", "random"]
    """Of the chain rule; random: each draw is an order of its own."""


class GenerateOptions(TypedDict, total=False):
    """What a generation may be told."""

    lengths: Any
    """Integers [rows]: what lies behind a prompt's length is padding."""
    prompt_mask: Any
    """bool [rows, columns]: True where a prompt's id is given; None: where it is not the mask id."""
    count: int | None
    """Rows to sample, 1 by default; with prompts: the first so many of them, by default all."""
    length: int
    """Tokens a row, 0 for the model's longest; with prompts the width to compute them at, 0 for their own."""
    steps: int
    """Unmasking passes; 0 for one position a pass."""
    order: str
    """random, confidence, margin, entropy or critic."""
    temperature: float | None
    """Of the sampling, 0 for the most probable token; None: 1."""
    top_k: int
    """Sample among so many most probable tokens; 0 for all."""
    top_p: float | None
    """Sample among the most probable tokens that together have this probability; None: 1."""
    choice_temperature: float | None
    """Of the noise on the order; None: the preset's."""
    remasking: bool
    """Let revealed positions be masked again when they rank lowest; with order confidence or critic."""
    self_cond_mode: str
    """two_pass, the evaluated model, or carry."""
    raw_weights: bool
    """Sample from the trained weights even when a moving average is kept."""
    row_seeds: Sequence[int]
    """One a row: a row depends on its seed and not on its neighbours."""
    seed: int
    """The first row's seed when there are no row_seeds; the next row has the next."""


class ListOptions(TypedDict, total=False):
    """Which recorded steps are asked for."""

    run_id: str
    """Refuse unless this is the run (WrongRunError); empty: whichever it is."""
    lineage: int
    """The lineage; 0: the newest. Its steps are those behind the step that it began from."""
    first_step: int
    """From this step; 0: from the lineage's first."""
    last_step: int
    """Up to and with this step; 0: to the lineage's last."""


@dataclass(frozen=True)
class RetryPolicy:
    """When to ask again."""

    retry_for: float = 300.0
    """Seconds to go on asking a server that does not answer."""
    attempt_timeout: float = 60.0
    """The deadline of one attempt, in seconds."""
    first_wait: float = 0.05
    longest_wait: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("retry_for", 0.0), ("attempt_timeout", 1e-3)):
            value = getattr(self, name)
            if not least <= value <= _LONGEST:
                raise ValueError(
                    f"{name.removeprefix('attempt_')} must be {least:g} to {_LONGEST:g} s, got {value}"
                )


def _same(request: T) -> T:
    return request


def _without_advice(error: MaskwireError) -> str:
    """The server's message without its advice to retry: this client retries by itself."""
    return _ADVICE.sub("", str(error))


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


class Asking:
    """Conversations that need no session: each asks until there is an answer."""

    def __init__(
        self, target: str, policy: RetryPolicy, on_wait: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.target = target
        self._policy = policy
        self._on_wait = on_wait
        self._clock = clock
        self._reached = False  # the server has answered this client, if only with a refusal

    def eval_loss(self, tokens: Any, **options: Unpack[EvalOptions]) -> Talk[results.EvalResult]:
        """Evaluate one batch."""
        request = codec.eval_request(tokens, **options)
        return codec.read_eval((yield from self._ask("EvalLoss", lambda: request)))

    def evaluate(
        self,
        data: Any,
        *,
        rows: int | None,
        batch_size: int | None,
        on_progress: evaluations.Progress | None,
        **options: Unpack[EvalOptions],
    ) -> Talk[results.EvalResult]:
        """Evaluate a whole data set, some rows a call."""
        if not hasattr(data, "batch"):  # of a TokenData
            arguments.check_rows(data, "data")
        plan = evaluations.Plan(data, rows=rows, batch_size=batch_size, **options)
        total = evaluations.Sum(plan.passed_over)
        calls = plan.calls((yield from self._bounds()))
        # Reading takes its time, and who is told may call the client.
        while (request := (yield Work(partial(next, calls, None)))) is not None:
            total.add(codec.read_eval((yield from self._ask("EvalLoss", partial(_same, request)))))
            if on_progress is not None:
                yield Work(partial(on_progress, total.rows, plan.rows, total.nats_per_token))
        return total.result(plan.text_bytes)

    def generate(self, prompts: Any, **options: Unpack[GenerateOptions]) -> Talk[results.GenerateResult]:
        """Sample rows."""
        return (yield from self._sample(codec.generate_request(prompts, **options)))

    def generate_steps(self, prompts: Any, **options: Unpack[GenerateOptions]) -> Talk[None]:
        """Sample rows, and give a result for each unmasking pass."""
        yield from self._sample(codec.generate_request(prompts, stream_steps=True, **options))

    def _sample(self, request: pb.GenerateRequest) -> Talk[results.GenerateResult]:
        """Sample in as many calls as the server's limits take."""
        give = request.stream_steps
        plan = None
        if generations.rows_of(request) > 1:
            bounds = yield from self._bounds()
            if 0 <= request.length <= bounds.model.max_seq_len:
                plan = generations.Plan(request, bounds)
        if plan is None or plan.fits:
            return (yield from self._generate(request, give=give))
        rows = generations.Rows(plan)
        for part in plan.parts():
            found = yield from self._generate(part.request, give=give, among=partial(rows.take, part))
        return found

    def _generate(
        self,
        request: pb.GenerateRequest,
        *,
        give: bool,
        among: Callable[[results.GenerateResult], results.GenerateResult] = lambda found: found,
    ) -> Talk[results.GenerateResult]:
        """One call; `among` puts what it found among the rows of other calls."""
        # Asked again only while nothing has come: later the weights may be other ones.
        stream, response = yield from self._ask("Generate", lambda: request, stream=True)
        while response is not None:
            last = response.done
            found = among(codec.read_generation(response))
            if give:
                yield Give(found)
            if last:
                return found
            response = yield Next(stream)
            if isinstance(response, Failure):
                raise response.error
        raise UnavailableError(f"{self.target} ended the generation before its last pass; ask again")

    def checkpoint(
        self,
        name: str,
        labels: Mapping[str, str] | None,
        score: float | None,
        expected_lineage: int | None,
        expected_step: int | None,
    ) -> Talk[results.CheckpointInfo]:
        """Save a checkpoint."""
        request = pb.CheckpointRequest(
            request_id=new_id(),
            name=name,
            labels=labels,
            score=score,
            expected_lineage=expected_lineage,
            expected_step=expected_step,
        )
        response = yield from self._ask("Checkpoint", lambda: request)
        return codec.read_checkpoint(response.checkpoint)

    def checkpoints(self) -> Talk[list[results.CheckpointInfo]]:
        """List the checkpoints, newest first."""
        found: list[results.CheckpointInfo] = []
        request = pb.ListCheckpointsRequest()
        while True:
            response = yield from self._ask("ListCheckpoints", lambda: request)
            found += [codec.read_checkpoint(info) for info in response.checkpoints]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def list_steps(self, **options: Unpack[ListOptions]) -> Talk[None]:
        """Give each recorded step of a range."""
        token = ""
        while True:
            page = yield from self.steps_page(page_token=token, **options)
            for step in page.steps:
                yield Give(step)
            token = page.next_page_token
            if not token:
                return

    def steps_page(
        self, page_size: int = 0, page_token: str = "", **options: Unpack[ListOptions]
    ) -> Talk[results.StepsPage]:
        """A page of recorded steps."""
        request = pb.ListStepsRequest(page_size=page_size, page_token=page_token, **options)
        return codec.read_steps((yield from self._ask("ListSteps", lambda: request)))

    def delete(self, name: str) -> Talk[None]:
        """Delete a checkpoint."""
        yield from self._ask("DeleteCheckpoint", lambda: pb.DeleteCheckpointRequest(name=name))

    def restore(self, name: str, expected_step: int | None) -> Talk[results.RestoreResult]:
        """Go back to a checkpoint."""
        request = pb.RestoreCheckpointRequest(request_id=new_id(), name=name, expected_step=expected_step)
        response = yield from self._ask("RestoreCheckpoint", lambda: request)
        return results.RestoreResult(response.lineage, response.step, response.digest)

    def download(
        self, name: str, folder: Path, *, weights: bool, ema: bool, on_progress: Progress | None
    ) -> Talk[Path]:
        """Fetch a checkpoint's files, each from where an earlier attempt ended."""
        listed = yield from self.checkpoints()
        info = next((info for info in listed if info.name == name), None)
        if info is None:
            names = ", ".join(info.name for info in listed[:3]) or "none"
            raise CheckpointError(
                f"no checkpoint is named {name!r}; the newest are: {names}", reason="CHECKPOINT_NOT_FOUND"
            )
        target = Target(info, folder, weights=weights, ema=ema, on_progress=on_progress)
        try:
            yield from self._fetch(target)
        finally:
            target.finish()
        return target.folder

    def _fetch(self, target: Target) -> Talk[None]:
        for part in (yield Work(target.missing)):
            while not part.whole:
                place = part.size
                yield from self._ask("DownloadCheckpoint", part.request, take=part.take, moved=part.here)
                if part.size == place:
                    raise CheckpointError(f"{self.target} sent nothing more of {part.name}; download again")

    def status(self) -> Talk[results.Status]:
        """Is it stuck or working?"""
        return codec.read_status((yield from self._ask("GetStatus", pb.GetStatusRequest)))

    def _bounds(self) -> Talk[Bounds]:
        """What one call may ask of the server, once it has built its model."""
        began = self._clock()
        while True:
            found = yield from self.status()
            if found.model is not None:
                return Bounds(found.limits, found.model)
            if self._clock() - began >= self._policy.retry_for:
                raise UnavailableError(
                    f"{self.target} is building the model; ask again in a moment", reason="RECOVERING"
                )
            yield Pause(self._policy.longest_wait)

    def _lost(self) -> None:
        """The server could not be reached; it may have been restarted."""

    def _ask(
        self,
        method: str,
        make: Callable[[], Any],
        *,
        turn: Turn | None = None,
        take: Callable[[Any], None] | None = None,
        moved: Callable[[], int] = lambda: 0,
        began: float | None = None,
        stream: bool = False,
    ) -> Talk[Any]:
        """Ask until there is an answer, or an error that asking again does not help.

        With `stream` the answer is a `Stream` and its first message. `turn` is of a call that has its place
        in an order.
        `moved` tells how far a stream has come: one that comes further is not given up. `began` is when
        whatever needs the answer began to ask.
        """
        began, attempt, told = self._clock() if began is None else began, 0, ""
        said: tuple[MaskwireError, float] | None = None  # the last that the server itself answered, and when
        while True:
            if turn:
                yield from turn.before(began)
            place, timeout = moved(), self._timeout(method)
            opened = Stream(method, make(), timeout) if stream else None
            reply = yield Next(opened) if opened is not None else Call(method, make(), timeout, take)
            if turn:
                turn.answered()
            if not isinstance(reply, Failure):
                self._reached = True
                return reply if opened is None else (opened, reply)
            error = reply.error
            if not reply.unreachable:
                self._reached = True
                said = error, self._clock()
            if reply.unresolved and not self._reached:
                raise error
            if moved() != place:
                began, attempt = self._clock(), 0
            elapsed = self._clock() - began
            if turn and elapsed < self._policy.retry_for and (yield from turn.again(error)):
                continue
            wait = wait_before_retry(reply, attempt, elapsed, self._policy)
            if wait is None:
                raise self._given_up(method, reply, said) if reply.retryable else error
            if reply.unreachable:
                self._lost()
            message = f"waiting for {self.target}: {_without_advice(error)}"
            if attempt and message != told:  # the first failure is often the last
                self._on_wait(message)
                told = message
            attempt += 1
            yield Pause(wait)

    def _given_up(
        self, method: str, last: Failure, said: tuple[MaskwireError, float] | None
    ) -> UnavailableError:
        """What ends the patience; a server that answers HELD is not one that is out of reach."""
        error, patience = last.error, f"{self._policy.retry_for:g} s"
        if not last.unreachable:
            words = (
                f"{self.target} still answers {error.reason} after {patience}: {_without_advice(error)}; "
                f"`maskwire status -t {self.target}` shows what it waits for"
            )
        else:
            words = (
                f"{self.target} did not answer within {patience} ({error}); is the server running and the "
                "address right?"
            )
            if method != "GetStatus":  # which is what the command asks
                words += f" `maskwire status -t {self.target}` tells"
            if said is not None:
                answer, when = said
                ago = self._clock() - when
                words += "" if words.endswith("?") else "."
                words += f" Its last answer, {ago:.0f} s ago, was {answer.reason}: {_without_advice(answer)}"
        return UnavailableError(words, reason=error.reason, metadata=error.metadata)

    def _timeout(self, method: str) -> float:
        """The deadline of one attempt."""
        timeout, retry_for = self._policy.attempt_timeout, self._policy.retry_for
        if method == "Generate":  # it may have thousands of passes; keepalive finds a server that is gone
            return _LONGEST
        if method in _SLOW:
            return max(timeout, retry_for)
        return min(timeout, max(1.0, retry_for)) if method in _QUICK else timeout
