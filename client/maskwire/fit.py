"""The training loop: a window of steps in flight, evaluations, checkpoints, progress and metrics.

The loop is written once, as a generator of wishes that the blocking and the asyncio client grant. Step
targets are absolute and data is a function of the step, so the same call after any interruption goes on
where the run is.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from maskwire.errors import ConflictError, MaskwireError, UnimplementedError
from maskwire.metrics import Metrics, evaluation_line, step_line
from maskwire.results import EvalResult, StepResult

if TYPE_CHECKING:
    from maskwire.client import Trainer

PLAIN_EVERY_SECONDS = 10.0
LEAVE_SECONDS = 10.0  # for the steps in flight, once interrupted


class Data(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Any:
        """The rows to train on at a step: a pure function of it."""


@dataclass
class FitResult:
    """What a call of `fit` did."""

    first_step: int
    step: int
    """The last step trained."""
    seconds: float = 0.0
    tokens: int = 0
    interrupted: bool = False
    """Ctrl-C ended it."""
    last: StepResult | None = None
    evaluations: list[EvalResult] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens sent, prompts included and padding not."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Progress(Protocol):
    """Shows how far training is."""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """A step was trained."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Training ended."""


@dataclass(frozen=True)
class Take:
    """A wish: the result of a step in flight, within `timeout` seconds."""

    future: Any
    timeout: float | None


Wish = Take | Callable[[], Any]
"""A callable is a wish for what it returns, awaited where that can be."""


def fit(trainer: Trainer, data: Data, *, until_step: int, **options: Any) -> FitResult:
    """Train until the run is at `until_step`; the options are those of `plan`.

    Ctrl-C finishes the steps in flight, for at most 10 s, and returns; the next call goes on.
    """
    from maskwire.client import result_of

    wishes = plan(trainer, data, until_step=until_step, **options)
    reply: Any = None
    raised: BaseException | None = None
    try:
        while True:
            wish = wishes.send(reply) if raised is None else wishes.throw(raised)
            reply = raised = None
            try:
                reply = result_of(wish.future, wish.timeout) if isinstance(wish, Take) else wish()
            except BaseException as error:
                raised = error
    except StopIteration as done:
        result: FitResult = done.value
        return result


def plan(
    trainer: Any,
    data: Data,
    *,
    until_step: int,
    evaluate: Callable[[Any], Any] | None = None,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    save_best: bool = False,
    metrics: str | Path | None = None,
    progress: bool | Progress = True,
    on_step: Callable[[StepResult], None] | None = None,
    **modes: Any,
) -> Generator[Wish, Any, FitResult]:
    """The wishes of one call of `fit`.

    `evaluate(trainer)` runs every `eval_every` steps and a checkpoint is saved every
    `checkpoint_every`; both are absolute multiples. These checkpoints stay until somebody deletes them;
    the server's own (`checkpoints.every_steps`) are collected. With `save_best` the state of each best
    evaluation so far is saved with its `nats_per_token` as score; the server keeps the best. An evaluation
    or checkpoint of the run's present step that an earlier call was stopped before comes first. `metrics`
    is a file that gets one JSON line a step, those of earlier steps filled in (`maskwire.metrics`);
    `on_step` is called with the result of each step of this call. `modes` go to each step
    (`only_train_critic`, `learning_rate`, ...). Data that knows its `tokenizer` has it kept with the run.
    """
    yield trainer.settle  # steps that an interrupted call left in flight have numbers already
    result = FitResult(first_step=trainer.step + 1, step=trainer.step)
    log = Metrics(metrics) if metrics is not None else None
    if isinstance(progress, bool):
        progress = _progress(progress, trainer.step, until_step)
    loop = _Loop(trainer, data, result, progress, log, on_step, modes)

    def save(score: float | None = None) -> Generator[Wish, Any, None]:
        place = {"expected_lineage": trainer.lineage, "expected_step": result.step}
        saved = yield partial(trainer.checkpoint, score=score, **place)
        progress.say(f"step {result.step}: checkpoint {saved.name}")

    best = math.inf

    def evaluation() -> Generator[Wish, Any, None]:
        nonlocal best
        assert evaluate is not None
        found = yield partial(evaluate, trainer)
        result.evaluations.append(found)
        loop.record_evaluation(found)
        if save_best and found.nats_per_token < best:
            best = found.nats_per_token
            yield from save(score=best)
        # Last: what was not seen to its end is made up for by the next call.
        yield trainer.mark_evaluated

    stops = [every for every in (eval_every if evaluate else None, checkpoint_every) if every]
    began = time.monotonic()
    try:
        if log is not None:
            yield from log.catch_up(trainer)
        if getattr(data, "tokenizer", "") and result.step < until_step:
            yield partial(trainer.use_tokenizer, data.tokenizer)  # type: ignore[attr-defined]
        if save_best and evaluate:
            saved = yield trainer.checkpoints
            best = min([info.score for info in saved if info.score is not None], default=math.inf)
        # An earlier call may have been stopped between the step and its evaluation or checkpoint.
        if evaluate and eval_every and result.step % eval_every == 0 and (yield from _not_evaluated(trainer)):
            yield from evaluation()
        if checkpoint_every and result.step and result.step % checkpoint_every == 0:
            saved = yield trainer.checkpoints
            if not any((info.step, info.digest) == (trainer.step, trainer.digest) for info in saved):
                yield from save()
        while result.step < until_step:
            # Evaluations and checkpoints are of an exact step: nothing may be in flight then.
            stop = min([until_step, *((result.step // every + 1) * every for every in stops)])
            yield from loop.run(stop)
            if evaluate and eval_every and result.step % eval_every == 0:
                yield from evaluation()
            if checkpoint_every and result.step % checkpoint_every == 0:
                yield from save()
    except KeyboardInterrupt:
        result.interrupted = True
        left = yield from loop.leave()
        progress.say(
            f"interrupted at step {result.step}; the same command goes on from there"
            + (f" ({left} steps in flight may have been applied too)" if left else "")
        )
    finally:
        loop.forget()
        result.seconds = time.monotonic() - began
        progress.close()
        if log is not None:
            log.close()
    return result


def _not_evaluated(trainer: Any) -> Generator[Wish, Any, bool]:
    """Whether the present step was trained on this lineage, and no call has evaluated it."""
    step = trainer.step
    if not step or trainer.evaluated == (trainer.lineage, step):
        return False
    try:
        page = yield partial(trainer.steps_page, lineage=trainer.lineage, first_step=step, last_step=step)
    except UnimplementedError:  # an older server keeps no evaluations
        return False
    return bool(page.steps)


class _Loop:
    def __init__(
        self,
        trainer: Any,
        data: Data,
        result: FitResult,
        progress: Progress,
        log: Metrics | None,
        on_step: Callable[[StepResult], None] | None,
        modes: dict[str, Any],
    ) -> None:
        self._trainer, self._data, self._result = trainer, data, result
        self._progress, self._log, self._on_step, self._modes = progress, log, on_step, modes
        self._in_flight: deque[tuple[int, Any]] = deque()

    def run(self, stop: int) -> Generator[Wish, Any, None]:
        """Train up to and with step `stop`, with as many in flight as the trainer allows."""
        for step in range(self._result.step + 1, stop + 1):
            rows = self._data.batch(step)
            tokens = sum(len(row) for row in rows)
            try:
                future = yield partial(self._trainer.submit, rows, step=step, **self._modes)
            except ConflictError:
                while self._in_flight:  # the step that was refused says why
                    yield from self._take()
                raise
            self._in_flight.append((tokens, future))
            while self._in_flight and self._in_flight[0][1].done():
                yield from self._take()
        while self._in_flight:
            yield from self._take()

    def forget(self) -> None:
        """What became of steps that nobody asks for any more is no news."""
        for _, future in self._in_flight:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def leave(self) -> Generator[Wish, Any, int]:
        """Wait a little for what is in flight; how many steps were left."""
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            while self._in_flight:
                yield from self._take(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, MaskwireError):
            pass
        return len(self._in_flight)

    def _take(self, timeout: float | None = None) -> Generator[Wish, Any, None]:
        tokens, future = self._in_flight[0]
        answer = yield Take(future, timeout)
        self._in_flight.popleft()
        result = self._result
        result.step, result.last = answer.step, answer
        result.tokens += tokens
        if self._log is not None:
            self._log.write(step_line(self._trainer.run_id, self._trainer.lineage, answer, tokens))
        note = "" if answer.outcome.name == "APPLIED" else answer.outcome.name
        self._progress.update(answer.step, answer.loss, tokens, note)
        if self._on_step is not None:
            self._on_step(answer)

    def record_evaluation(self, found: EvalResult) -> None:
        error = f" ± {found.standard_error / math.log(2):.3f}" if found.standard_error is not None else ""
        self._progress.say(f"step {found.step}: held out {found.bits_per_token:.3f}{error} bits per token")
        if self._log is not None:
            self._log.write_evaluation(evaluation_line(self._trainer.run_id, self._trainer.lineage, found))


def _progress(wanted: bool, step: int, until_step: int) -> Progress:
    if not wanted:
        return Silent()
    if sys.stderr.isatty():
        from maskwire.progress import Bar

        return Bar(step, until_step)
    return Plain(step, until_step)


class Silent:
    """Shows nothing."""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Plain:
    """A line on stderr now and then, for logs."""

    def __init__(self, step: int, until_step: int) -> None:
        self._first, self._until = step, until_step
        self._began = self._told = time.monotonic()
        self._tokens = 0
        self._last = ""

    def update(self, step: int, loss: float, tokens: int, note: str = "") -> None:
        """Tell how it goes every few seconds."""
        self._tokens += tokens
        now = time.monotonic()
        spent = max(now - self._began, 1e-9)
        left = spent / max(1, step - self._first) * (self._until - step)
        self._last = (
            f"step {step}/{self._until}  loss {loss:.4f}  {self._tokens / spent:,.0f} tokens/s  "
            f"{left:.0f} s left  {note}".rstrip()
        )
        if now - self._told >= PLAIN_EVERY_SECONDS:
            self._told, line, self._last = now, self._last, ""
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Say where it ended."""
        if self._last:
            print(self._last, file=sys.stderr, flush=True)
