"""The training loop: steps, evaluations, checkpoints, progress, callbacks and loggers.

The loop is a generator of actions, which the blocking and the asyncio client perform. `until_step` is
absolute and the data is a function of the step, so a call that is repeated after an interruption resumes at
the run's current step.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from maskwire.arguments import check_data, check_flag, check_function, check_options, check_whole
from maskwire.callbacks import EarlyStopping, SaveBest, StopTraining
from maskwire.errors import ForkError
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.logger import Logger
from maskwire.loggers.progress import TrainingProgress, check_progress, training_progress
from maskwire.protocol.fit_actions import Fitting, ResultOf
from maskwire.protocol.fit_callbacks import Callbacks, check_callbacks
from maskwire.protocol.fit_data_check import files_of, record_data
from maskwire.protocol.fit_loggers import Loggers
from maskwire.protocol.fit_milestones import Milestones
from maskwire.protocol.fit_result import FitResult
from maskwire.protocol.fit_step_inputs import Data, LearningRate, StepInputs
from maskwire.protocol.fit_window import FitWindow
from maskwire.protocol.option_types import FitOptions
from maskwire.results import StepResult

__all__ = ["Data", "FitResult", "Fitting", "ResultOf", "StopTraining", "fit"]


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
    callbacks: Sequence[Any] = (),
    on_step: Callable[[StepResult], object] | None = None,
    learning_rate: LearningRate = None,
    progress: bool | TrainingProgress = True,
    allow_changed_data: bool = False,
    **options: Unpack[FitOptions],
) -> Fitting[FitResult]:
    """Train until the run is at `until_step`, and return a FitResult.

    data: An object whose `batch(step)` returns the rows of a step, or a `maskwire.Batch` of rows with their
        lengths and prompt mask. If the object has a `tokenizer` or a `fingerprint()`, these are recorded with
        the run.
    until_step: The number of the last step to train, counted from the start of the run. If the run is there
        already, nothing is trained.
    evaluate, eval_every: `evaluate(trainer)` is called every `eval_every` steps and returns an EvalResult.
        With `maskwire.aio` it may be a coroutine function.
    checkpoint_every: Number of steps between checkpoints, which are kept until they are deleted. The server
        deletes only old checkpoints of its own (`checkpoints.every_steps`).
    save_best: True has the same effect as a `SaveBest()` among the callbacks.
    metrics: A file for one JSON line per step: the same as a `JsonLines(metrics)` among the callbacks. If the
        file cannot be written, the result's `metrics_failure` has the reason.
    callbacks: Objects with methods such as `on_evaluate` (`maskwire.callbacks`), and loggers
        (`maskwire.loggers`), which write the run's history somewhere and add earlier steps that their log
        lacks. If one of them fails, the result's `failures` has the reason, and training continues.
    on_step: A function that is called with the result of each step. `fit` raises the function's errors,
        except StopTraining.
    progress: True for a bar or lines, False for no output, or an object of your own
        (`maskwire.loggers.progress.TrainingProgress`).
    allow_changed_data: Train even if the data differs from what the run was trained on, instead of raising
        DataMismatchError.
    learning_rate: The learning rate of each step, or a function of the step that returns it, instead of the
        server's schedule. The function must depend only on the step; if it returns None, the schedule
        applies.
    options: Options that are passed to each step, such as `only_train_critic`.

    Evaluations and checkpoints happen at multiples of their intervals. If an earlier call was stopped before
    the evaluation or checkpoint of the run's current step, this call does that first.

    StopTraining from a callback, `evaluate`, `data.batch` or `learning_rate` ends training early: `fit` waits
    for the steps in flight, saves a checkpoint, and returns a result with `.stopped` set.

    After Ctrl-C, `fit` waits at most 10 s for the steps in flight, and returns a result with `.interrupted`
    set. With `maskwire.aio`, a cancelled task ends at once, and `close` waits for the steps in flight. The
    next call resumes.

    Raises TypeError or ValueError for an invalid argument, such as an `until_step` below 0, an interval below
    1, or `evaluate` without `eval_every` and the reverse.
    """
    check_data("fit", data)
    check_options("fit", options, FitOptions.__annotations__, also=_OWN)
    check_whole("until_step", until_step, 0)
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None:
            check_whole(name, every, 1, cure=", or None for never")
    for name, flag in (("save_best", save_best), ("allow_changed_data", allow_changed_data)):
        check_flag(name, flag)
    awaited = inspect.iscoroutinefunction(getattr(trainer, "submit", None))  # True for the asyncio client
    for name, function in (("on_step", on_step), ("evaluate", evaluate)):
        check_function(name, function, awaited=awaited)
    called = check_callbacks(callbacks, awaited=awaited)
    called = _with_save_best(called, save_best, evaluate is not None and eval_every is not None)
    _check_evaluation(evaluate, eval_every)
    check_progress(progress)
    inputs = StepInputs(data, options, learning_rate)
    lines = None if metrics is None else JsonLines(metrics)
    logging = [one for one in [lines, *called] if isinstance(one, Logger)]
    called = [one for one in called if not isinstance(one, Logger)]
    yield trainer.settle  # an interrupted call may have left steps in flight
    result = FitResult(first_step=trainer.step + 1, step=trainer.step)
    _check_paths(logging, files_of(data))
    if isinstance(progress, bool):
        progress = training_progress(progress, trainer.step, until_step, lambda: trainer.seconds_waited)
    loggers = Loggers(trainer, result, progress, logging, lines)
    calls = Callbacks(trainer, result, progress, called, on_step)
    window = FitWindow(trainer, inputs, result, progress, loggers, calls)
    milestones = Milestones(
        trainer,
        result,
        progress,
        loggers,
        calls,
        evaluate=evaluate,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
    )
    began, waited = time.monotonic(), trainer.seconds_waited
    try:
        try:
            recording = record_data(trainer, data, allow_changed_data) if result.step < until_step else None
            first_actions = _begin(recording, loggers, calls)
            yield from _train(first_actions, until_step, window, milestones, calls, result, progress)
        finally:
            result.seconds = time.monotonic() - began
            result.seconds_waited = trainer.seconds_waited - waited
    except ForkError:
        raise  # in a forked child: loggers and callbacks belong to the parent
    except Exception:
        yield from _end(loggers, calls)
        raise
    else:
        try:
            yield from _end(loggers, calls)
        except KeyboardInterrupt:
            result.interrupted = True
    finally:
        window.forget()
        loggers.abandon()  # for a cancelled task, which skips `_end`; otherwise they are closed already
        progress.close()
    return result


def _begin(recording: Fitting[None] | None, loggers: Loggers, callbacks: Callbacks) -> Fitting[None]:
    """Record the data with the run, open the loggers and call the callbacks' `on_start`."""
    if recording is not None:
        yield from recording
    yield from loggers.open()
    yield from callbacks.start()


def _train(
    first_actions: Fitting[None],
    until_step: int,
    window: FitWindow,
    milestones: Milestones,
    callbacks: Callbacks,
    result: FitResult,
    progress: TrainingProgress,
) -> Fitting[None]:
    """Run the loop until the run is at `until_step`, or until StopTraining or Ctrl-C ends it."""
    try:
        yield from first_actions
        yield from milestones.make_up()
        while result.step < until_step:
            yield from window.train(milestones.next_step(until_step))
            yield from milestones.reach()
    except StopTraining as stop:
        callbacks.stopping = result.stopped = True
        result.stop_reason = str(stop)
        yield from window.finish()
        if stop.checkpoint:
            yield from milestones.save_last()
        if result.stop_reason:
            progress.say(f"stopped at step {result.step}: {result.stop_reason}")
    except KeyboardInterrupt:
        callbacks.stopping = result.interrupted = True
        left = yield from window.leave()
        progress.say(
            f"interrupted at step {result.step}; run the same command to resume"
            + (f" ({left} steps in flight may have been applied too)" if left else "")
        )


def _end(loggers: Loggers, callbacks: Callbacks) -> Fitting[None]:
    yield from loggers.close()
    yield from callbacks.end()


_OWN = [name for name in inspect.signature(fit).parameters if name not in ("trainer", "data", "options")]
"""The names of `fit`'s own arguments, which are not passed to each step."""


def _check_evaluation(evaluate: object, eval_every: int | None) -> None:
    """Raise ValueError for `evaluate` without `eval_every` or the reverse: nothing would be evaluated."""
    if evaluate is not None and eval_every is None:
        raise ValueError("evaluate needs eval_every, the number of steps between evaluations, got None")
    if eval_every is not None and evaluate is None:
        raise ValueError(
            f"eval_every={eval_every} needs evaluate, such as lambda trainer: trainer.evaluate(held_out), "
            "got None"
        )


def _with_save_best(callbacks: list[Any], save_best: bool, evaluated: bool) -> list[Any]:
    """Return the callbacks, with a SaveBest added if `save_best` is True and there is none.

    Raises ValueError if a callback needs evaluations and `evaluated` is False.
    """
    if save_best and not any(isinstance(one, SaveBest) for one in callbacks):
        callbacks = [*callbacks, SaveBest()]
    for one in callbacks:
        if isinstance(one, SaveBest | EarlyStopping) and not evaluated:
            name = "save_best" if save_best and isinstance(one, SaveBest) else type(one).__name__
            what = "what to save the best of" if isinstance(one, SaveBest) else "when to stop"
            raise ValueError(f"{name} needs evaluate and eval_every, which determine {what}; pass both")
    return callbacks


def _check_paths(loggers: Sequence[Logger], files: Sequence[Path]) -> None:
    """Raise ValueError if a logger would write to a file of the data, or to the same place as another one."""
    data = {path.resolve() for path in files}
    seen: set[Path] = set()
    for logger in loggers:
        if logger.path is None:
            continue
        path = logger.path.resolve()
        if path in data:
            raise ValueError(f"{logger.label} is a file of the data; choose another file for the log")
        if path in seen:
            raise ValueError(f"two loggers write to {logger.label}; choose another place for one of them")
        seen.add(path)
