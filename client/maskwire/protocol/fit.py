"""The training loop: a window of steps in flight, evaluations, checkpoints, progress and metrics.

The loop is written once, as a generator of wishes that the blocking and the asyncio client grant. Step
targets are absolute and data is a function of the step, so the same call after any interruption goes on
where the run is.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from maskwire.arguments import call_back, check_data, check_options, check_rows, check_whole
from maskwire.errors import ConflictError, DataMismatchError, MaskwireError, UnimplementedError
from maskwire.loggers.metrics import Metrics, evaluation_line, step_line
from maskwire.output import on_terminal, tell
from maskwire.protocol import codec
from maskwire.results import EvalResult, StepResult

if TYPE_CHECKING:
    from maskwire.client import Trainer

_NEWEST = 3  # files that an error names
PLAIN_EVERY_SECONDS = 10.0
LEAVE_SECONDS = 10.0  # for the steps in flight, once interrupted


class StopTraining(Exception):
    """Raise it in `on_step`, `evaluate` or `data.batch` to end `fit` early.

    `fit` takes the results of the steps in flight, at most a window, and returns with `.stopped`.
    """


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
    stopped: bool = False
    """StopTraining ended it."""
    last: StepResult | None = None
    evaluations: list[EvalResult] = field(default_factory=list)
    metrics_failure: str = ""
    """Why lines of the metrics file are missing, such as a full disk; empty: none is."""

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


@dataclass(frozen=True)
class Apart:
    """A wish: what this returns, which reads files and so keeps an event loop waiting."""

    act: Callable[[], Any]


Wish = Take | Apart | Callable[[], Any]
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
                if isinstance(wish, Take):
                    trainer._check_process()  # of a child that a callback forked: nothing answers there
                    reply = result_of(wish.future, wish.timeout)
                else:
                    reply = wish.act() if isinstance(wish, Apart) else wish()
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
    allow_changed_data: bool = False,
    **modes: Any,
) -> Generator[Wish, Any, FitResult]:
    """The wishes of one call of `fit`.

    `evaluate(trainer)` runs every `eval_every` steps and a checkpoint is saved every
    `checkpoint_every`; both are absolute multiples. These checkpoints stay until somebody deletes them;
    the server's own (`checkpoints.every_steps`) are collected. With `save_best` the state of each best
    evaluation so far is saved with its `nats_per_token` as score; the server keeps the best. An evaluation
    or checkpoint of the run's present step that an earlier call was stopped before comes first. `metrics`
    is a file that gets one JSON line a step, those of earlier steps filled in (`maskwire.loggers.metrics`);
    `on_step` is called with the result of each step of this call. `modes` go to each step
    (`only_train_critic`, `learning_rate`, ...). Data that knows its `tokenizer` has it kept with the run.
    So is the `fingerprint()` of data that has one: DataMismatchError if the run was trained on other data,
    whatever changed its batches, unless `allow_changed_data`. A metrics file that cannot be written any
    more is said once and costs no step; the result's `metrics_failure` has the reason. Raises ValueError
    for an `until_step` below 0 and for an interval below 1.
    """
    check_data("fit", data)
    own = [name for name in inspect.signature(plan).parameters if name not in ("trainer", "data", "modes")]
    check_options("fit", modes, codec.STEP_OPTIONS, also=own)
    check_whole("until_step", until_step, 0)
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None:
            check_whole(name, every, 1, cure=", or None for never")
    yield trainer.settle  # steps that an interrupted call left in flight have numbers already
    result = FitResult(first_step=trainer.step + 1, step=trainer.step)
    if metrics is not None and Path(metrics).resolve() in (path.resolve() for path in _files_of(data)):
        raise ValueError(f"metrics: {metrics} is a file of the data; name another file")
    if save_best and not (evaluate and eval_every):
        raise ValueError("save_best needs evaluate and eval_every, which say what to save the best of")
    log: Metrics | None = None
    if isinstance(progress, bool):
        progress = _progress(progress, trainer.step, until_step)
    loop = _Loop(trainer, data, result, progress, on_step, modes)

    def save(score: float | None = None) -> Generator[Wish, Any, None]:
        place = {"expected_lineage": trainer.lineage, "expected_step": result.step}
        saved = yield partial(trainer.checkpoint, score=score, **place)
        progress.say(f"step {result.step}: checkpoint {saved.name}")

    best = math.inf

    def evaluation() -> Generator[Wish, Any, None]:
        nonlocal best
        assert evaluate is not None
        found = yield partial(call_back, "evaluate", evaluate, trainer)
        if not hasattr(found, "bits_per_token"):
            raise TypeError(
                f"evaluate must return an EvalResult, got {type(found).__name__}: end it with "
                "`return trainer.evaluate(data)`, and log other numbers there"
            )
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
        if getattr(data, "tokenizer", "") and result.step < until_step:
            yield partial(trainer.use_tokenizer, data.tokenizer)  # type: ignore[attr-defined]
        if hasattr(data, "fingerprint") and result.step < until_step:
            fingerprint = yield Apart(data.fingerprint)
            try:
                yield partial(trainer.use_data, fingerprint, allow_changed=allow_changed_data)
            except DataMismatchError as error:
                raise _with_newest(error, _files_of(data)) from None
        if metrics is not None:
            log = loop.log = Metrics(metrics)
            yield from log.catch_up(trainer)
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
    except StopTraining:
        result.stopped = True
        yield from loop.finish()
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
            result.metrics_failure = log.failure
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
        on_step: Callable[[StepResult], None] | None,
        modes: dict[str, Any],
    ) -> None:
        self._trainer, self._data, self._result = trainer, data, result
        self._progress, self._on_step, self._modes = progress, on_step, modes
        self.log: Metrics | None = None
        self._in_flight: deque[tuple[int, Any]] = deque()

    def run(self, stop: int) -> Generator[Wish, Any, None]:
        """Train up to and with step `stop`, with as many in flight as the trainer allows."""
        for step in range(self._result.step + 1, stop + 1):
            rows = call_back("data.batch", self._data.batch, step)
            if rows is None:
                raise TypeError(f"data.batch({step}) must return rows of token ids, it returned None")
            check_rows(rows, f"data.batch({step})")
            try:
                tokens = sum(len(row) for row in rows)
            except TypeError as error:
                raise TypeError(
                    f"data.batch({step}) must return rows of token ids, it returned ids that are in no row: "
                    "return [row] for a batch of one"
                ) from error
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

    def finish(self) -> Generator[Wish, Any, None]:
        """Take what is in flight, without telling `on_step`, which wants no more."""
        self._on_step = None
        while self._in_flight:
            yield from self._take()

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
        if self.log is not None:
            self.log.write(step_line(self._trainer.run_id, self._trainer.lineage, answer, tokens))
        note = "" if answer.outcome.name == "APPLIED" else answer.outcome.name
        self._progress.update(answer.step, answer.loss, tokens, note)
        if self._on_step is not None:
            call_back("on_step", self._on_step, answer)

    def record_evaluation(self, found: EvalResult) -> None:
        error = f" ± {found.standard_error / math.log(2):.3f}" if found.standard_error is not None else ""
        self._progress.say(f"step {found.step}: held out {found.bits_per_token:.3f}{error} bits per token")
        if self.log is not None:
            self.log.write_evaluation(evaluation_line(self._trainer.run_id, self._trainer.lineage, found))


def _files_of(data: Data) -> list[Path]:
    """The files that data comes from, as far as it says."""
    files: list[Path] = getattr(data, "files", [])
    return files


def _with_newest(error: DataMismatchError, files: list[Path]) -> DataMismatchError:
    """The error with the files that were written last: the run keeps a hash of the data, no names."""
    if "content" not in error.metadata.get("changed", "").split(","):
        return error
    times = {path: path.stat().st_mtime for path in files if path.exists()}
    newest = sorted(times, key=lambda path: times[path], reverse=True)[:_NEWEST]
    if not newest:
        return error
    shown = ", ".join(
        f"{path} ({datetime.fromtimestamp(times[path], UTC):%Y-%m-%d %H:%M:%S} UTC)" for path in newest
    )
    return type(error)(
        f"{error}. The data is of {len(files)} files now; written last: {shown}. A file that is no data can "
        "be moved away or left out by a pattern (--pattern)",
        reason=error.reason,
        metadata=error.metadata,
    )


def _progress(wanted: bool, step: int, until_step: int) -> Progress:
    if not wanted:
        return Silent()
    if on_terminal():
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
            tell(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        tell(text)

    def close(self) -> None:
        """Say where it ended."""
        if self._last:
            tell(self._last)
