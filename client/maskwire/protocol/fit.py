"""The training loop: steps, evaluations, checkpoints, progress and metrics.

It is a generator of actions, which the blocking and the asyncio client perform. Step targets are absolute and
data is a function of the step, so repeating the call after any interruption resumes where the run is.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from maskwire.arguments import call_back, check_data, check_options, check_whole
from maskwire.errors import DataMismatchError, UnimplementedError
from maskwire.loggers.metrics import Metrics, evaluation_line
from maskwire.loggers.progress import TrainingProgress, training_progress
from maskwire.protocol import codec
from maskwire.protocol.data_tokenizer import keep_tokenizer
from maskwire.protocol.effects import Work
from maskwire.protocol.fit_window import Data, FitResult, Fitting, FitWindow, ResultOf
from maskwire.protocol.keyword_arguments import StepOptions
from maskwire.results import EvalResult, StepResult

__all__ = ["Data", "FitResult", "Fitting", "ResultOf", "StopTraining", "fit"]

_FILES_SHOWN = 3  # in an error


class StopTraining(Exception):
    """Raise it in `on_step`, `evaluate` or `data.batch` to end `fit` early.

    `fit` takes the results of the steps in flight, at most a window, and returns with `.stopped`.
    """


def fit(
    trainer: Any,
    data: Data,
    *,
    until_step: int,
    evaluate: Callable[[Any], Any] | None = None,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    save_best: bool = False,
    metrics: str | Path | None = None,
    progress: bool | TrainingProgress = True,
    on_step: Callable[[StepResult], None] | None = None,
    allow_changed_data: bool = False,
    **options: Unpack[StepOptions],
) -> Fitting[FitResult]:
    """Train until the run is at `until_step`, and return a FitResult.

    data: An object whose `batch(step)` returns the rows of a step. If it has a `tokenizer`, that is recorded
        with the run, and so is its `fingerprint()`.
    until_step: An absolute step. If the run is there already, nothing is trained.
    evaluate, eval_every: `evaluate(trainer)` is called every `eval_every` steps and returns an EvalResult.
        With `maskwire.aio` it may be a coroutine function.
    checkpoint_every: Number of steps between checkpoints, which are kept until they are deleted. The server
        deletes only old checkpoints of its own (`checkpoints.every_steps`).
    save_best: Save the state of each best evaluation so far, with its `nats_per_token` as the score. The
        server keeps the best.
    metrics: A file for one JSON line per step (`maskwire.loggers.metrics`). Missing earlier steps are filled
        in. If it cannot be written, training continues and the result's `metrics_failure` has the reason.
    progress: False for none, or an object of your own (`maskwire.loggers.progress.TrainingProgress`).
    on_step: Called with the result of each step.
    allow_changed_data: Train although the data differs from what the run was trained on, which otherwise
        raises DataMismatchError.
    options: Passed to each step, such as `only_train_critic` or `learning_rate`.

    Evaluations and checkpoints happen at multiples of their intervals. If an earlier call was stopped before
    the evaluation or checkpoint of the run's current step, that comes first.

    Ctrl-C waits for the steps in flight, for at most 10 s, and returns with `.interrupted`. With
    `maskwire.aio` a cancelled task ends at once and leaves the steps in flight to `close`. The next call
    resumes.

    Raises ValueError for an `until_step` below 0 and for an interval below 1.
    """
    check_data("fit", data)
    own = [name for name in inspect.signature(fit).parameters if name not in ("trainer", "data", "options")]
    check_options("fit", options, codec.STEP_OPTIONS, also=own)
    check_whole("until_step", until_step, 0)
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None:
            check_whole(name, every, 1, cure=", or None for never")
    yield trainer.settle  # steps that an interrupted call left in flight have their numbers already
    result = FitResult(first_step=trainer.step + 1, step=trainer.step)
    if metrics is not None and Path(metrics).resolve() in (path.resolve() for path in _files_of(data)):
        raise ValueError(f"metrics: {metrics} is a file of the data; name another file")
    if save_best and not (evaluate and eval_every):
        raise ValueError("save_best needs evaluate and eval_every, which say what to save the best of")
    if isinstance(progress, bool):
        progress = training_progress(progress, trainer.step, until_step, lambda: trainer.seconds_waited)
    window = FitWindow(trainer, data, result, progress, on_step, dict(options))
    milestones = _Milestones(
        trainer,
        result,
        progress,
        evaluate=evaluate,
        eval_every=eval_every if evaluate else None,
        checkpoint_every=checkpoint_every,
        save_best=save_best,
    )
    began, waited = time.monotonic(), trainer.seconds_waited
    try:
        if result.step < until_step:
            yield from _record_data(trainer, data, allow_changed_data)
        if metrics is not None:
            window.metrics = milestones.metrics = Metrics(metrics)
            yield from window.metrics.catch_up(trainer)
        yield from milestones.make_up()
        while result.step < until_step:
            yield from window.train(milestones.next_step(until_step))
            yield from milestones.reach()
    except StopTraining:
        result.stopped = True
        yield from window.finish()
    except KeyboardInterrupt:
        result.interrupted = True
        left = yield from window.leave()
        progress.say(
            f"interrupted at step {result.step}; run the same command to resume"
            + (f" ({left} steps in flight may have been applied too)" if left else "")
        )
    finally:
        window.forget()
        result.seconds = time.monotonic() - began
        result.seconds_waited = trainer.seconds_waited - waited
        progress.close()
        if window.metrics is not None:
            window.metrics.close()
            result.metrics_failure = window.metrics.failure
    return result


class _Milestones:
    """Evaluations and checkpoints, at multiples of their intervals, when no step is in flight."""

    def __init__(
        self,
        trainer: Any,
        result: FitResult,
        progress: TrainingProgress,
        *,
        evaluate: Callable[[Any], Any] | None,
        eval_every: int | None,
        checkpoint_every: int | None,
        save_best: bool,
    ) -> None:
        self._trainer, self._result, self._progress = trainer, result, progress
        self._evaluate = evaluate
        self._eval_every, self._checkpoint_every, self._save_best = eval_every, checkpoint_every, save_best
        self._best = math.inf
        self.metrics: Metrics | None = None

    def next_step(self, until_step: int) -> int:
        """Return the next step at which something is due, at most `until_step`."""
        intervals = [every for every in (self._eval_every, self._checkpoint_every) if every]
        return min([until_step, *((self._result.step // every + 1) * every for every in intervals)])

    def make_up(self) -> Fitting[None]:
        """Run the evaluation or checkpoint of the current step that an interrupted call did not finish."""
        trainer, step = self._trainer, self._result.step
        if self._save_best:
            saved = yield trainer.checkpoints
            self._best = min([info.score for info in saved if info.score is not None], default=math.inf)
        if self._due(self._eval_every) and (yield from _not_evaluated(trainer)):
            yield from self._run_evaluation()
        if step and self._due(self._checkpoint_every):
            saved = yield trainer.checkpoints
            if not any((info.step, info.digest) == (trainer.step, trainer.digest) for info in saved):
                yield from self._save()

    def reach(self) -> Fitting[None]:
        """Run the evaluation and the checkpoint that are due at the current step."""
        if self._due(self._eval_every):
            yield from self._run_evaluation()
        if self._due(self._checkpoint_every):
            yield from self._save()

    def _due(self, every: int | None) -> bool:
        return bool(every) and self._result.step % (every or 1) == 0

    def _save(self, score: float | None = None) -> Fitting[None]:
        position = {"expected_lineage": self._trainer.lineage, "expected_step": self._result.step}
        saved = yield partial(self._trainer.checkpoint, score=score, **position)
        self._progress.say(f"step {self._result.step}: checkpoint {saved.name}")

    def _run_evaluation(self) -> Fitting[None]:
        assert self._evaluate is not None
        found = yield partial(call_back, "evaluate", self._evaluate, self._trainer)
        if not hasattr(found, "bits_per_token"):
            raise TypeError(
                f"evaluate must return an EvalResult, got {type(found).__name__}: end it with "
                "`return trainer.evaluate(data)`, and log other numbers there"
            )
        self._result.evaluations.append(found)
        self._record(found)
        if self._save_best and found.nats_per_token < self._best:
            self._best = found.nats_per_token
            yield from self._save(score=self._best)
        yield self._trainer.mark_evaluated  # last: the next call makes up for what was not finished

    def _record(self, found: EvalResult) -> None:
        error = f" ± {found.standard_error / math.log(2):.3f}" if found.standard_error is not None else ""
        self._progress.say(f"step {found.step}: held out {found.bits_per_token:.3f}{error} bits per token")
        if self.metrics is not None:
            self.metrics.write_evaluation(evaluation_line(self._trainer.run_id, self._trainer.lineage, found))


def _not_evaluated(trainer: Any) -> Fitting[bool]:
    """Whether the current step was trained on this lineage and not evaluated yet."""
    step = trainer.step
    if not step or trainer.evaluated == (trainer.lineage, step):
        return False
    try:
        page = yield partial(trainer.steps_page, lineage=trainer.lineage, first_step=step, last_step=step)
    except UnimplementedError:  # an older server does not record evaluations
        return False
    return bool(page.steps)


def _record_data(trainer: Any, data: Any, allow_changed: bool) -> Fitting[None]:
    """Record the data's tokenizer and fingerprint with the run."""
    if getattr(data, "tokenizer", ""):
        yield partial(trainer.use_tokenizer, data.tokenizer)
        yield from keep_tokenizer(trainer, data)
    if hasattr(data, "fingerprint"):
        fingerprint = yield Work(data.fingerprint)
        try:
            yield partial(trainer.use_data, fingerprint, allow_changed=allow_changed)
        except DataMismatchError as error:
            raise _with_cause(error, trainer.data, fingerprint, _files_of(data)) from None


def _files_of(data: Any) -> list[Path]:
    """The files that the data comes from, if it names them."""
    files: list[Path] = getattr(data, "files", [])
    return files


def _with_cause(
    error: DataMismatchError, recorded: dict[str, str], given: dict[str, str], files: list[Path]
) -> DataMismatchError:
    """Add the probable cause to the error: another split, or else the files that were written last.

    The run records a hash of the data, no file names.
    """
    changed = error.metadata.get("changed", "").split(",")
    if "held_out" in changed:
        share = recorded.get("held_out")
        cure = f"the data split with held_out={share}" if share else "the data without a split"
        text = str(error)
        return type(error)(
            f"held_out was {share or 'not set'} and is {given.get('held_out', 'not set')}: train on {cure}. "
            f"{text[:1].upper()}{text[1:]}",
            reason=error.reason,
            metadata=error.metadata,
        )
    if "content" not in changed:
        return error
    times = {path: path.stat().st_mtime for path in files if path.exists()}
    newest = sorted(times, key=lambda path: times[path], reverse=True)[:_FILES_SHOWN]
    if not newest:
        return error
    shown = ", ".join(
        f"{path} ({datetime.fromtimestamp(times[path], UTC):%Y-%m-%d %H:%M:%S} UTC)" for path in newest
    )
    return type(error)(
        f"{error}. The data now consists of {len(files)} files; written last: {shown}. If one of them is not "
        "data, move it away or exclude it with a pattern (--pattern)",
        reason=error.reason,
        metadata=error.metadata,
    )
