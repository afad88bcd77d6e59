"""Runs the evaluations and saves the checkpoints of a training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from maskwire.arguments import call_back
from maskwire.errors import MaskwireError, UnimplementedError
from maskwire.loggers.progress import TrainingProgress, warn
from maskwire.loggers.records import evaluation_record
from maskwire.protocol.fit_actions import Fitting
from maskwire.protocol.fit_callbacks import Callbacks
from maskwire.protocol.fit_loggers import Loggers
from maskwire.protocol.fit_result import FitResult
from maskwire.results import EvalResult


class Milestones:
    """Runs evaluations and saves checkpoints at multiples of their intervals.

    Does so only when no step is in flight.
    """

    def __init__(
        self,
        trainer: Any,
        result: FitResult,
        progress: TrainingProgress,
        loggers: Loggers,
        callbacks: Callbacks,
        *,
        evaluate: Callable[[Any], Any] | None,
        eval_every: int | None,
        checkpoint_every: int | None,
    ) -> None:
        self._trainer, self._result, self._progress = trainer, result, progress
        self._loggers, self._callbacks = loggers, callbacks
        self._evaluate, self._eval_every, self._checkpoint_every = evaluate, eval_every, checkpoint_every

    def next_step(self, until_step: int) -> int:
        """Return the next step at which an evaluation or a checkpoint is due, but at most `until_step`."""
        intervals = [every for every in (self._eval_every, self._checkpoint_every) if every]
        return min([until_step, *((self._result.step // every + 1) * every for every in intervals)])

    def make_up(self) -> Fitting[None]:
        """Run the evaluation or checkpoint of the current step that an interrupted call did not finish."""
        if self._due(self._eval_every) and (yield from _not_evaluated(self._trainer)):
            yield from self._run_evaluation()
        if self._result.step and self._due(self._checkpoint_every):
            yield from self._save_unless_saved()
        self._callbacks.raise_stop()

    def reach(self) -> Fitting[None]:
        """Run the evaluation and save the checkpoint that are due at the current step."""
        if self._due(self._eval_every):
            yield from self._run_evaluation()
        if self._due(self._checkpoint_every):
            yield from self._save()
        self._callbacks.raise_stop()

    def save_last(self) -> Fitting[None]:
        """Save a checkpoint of the step at which StopTraining ended the loop. A failure is only reported."""
        if not self._result.step:
            return  # the server always keeps a run's state of step 0
        try:
            yield from self._save_unless_saved()
        except MaskwireError as error:
            words = f"step {self._result.step}: no checkpoint was saved ({error}); the steps are durable"
            self._result.failures.append(words)
            warn(self._progress, words)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self._result.step % (every or 1) == 0

    def _save_unless_saved(self) -> Fitting[None]:
        saved = yield self._trainer.checkpoints
        here = (self._trainer.step, self._trainer.digest)
        if not any((info.step, info.digest) == here for info in saved):
            yield from self._save()

    def _save(self) -> Fitting[None]:
        position = {"expected_lineage": self._trainer.lineage, "expected_step": self._result.step}
        yield from self._callbacks.saved((yield partial(self._trainer.checkpoint, **position)))

    def _run_evaluation(self) -> Fitting[None]:
        assert self._evaluate is not None
        found = yield partial(call_back, "evaluate", self._evaluate, self._trainer)
        if not hasattr(found, "bits_per_token"):
            raise TypeError(
                f"evaluate must return an EvalResult, got {type(found).__name__}: end the function with "
                "`return trainer.evaluate(data)`, and log other numbers inside it"
            )
        self._result.evaluations.append(found)
        self._show(found)
        self._loggers.write(evaluation_record(self._trainer.run_id, self._trainer.lineage, found))
        yield from self._callbacks.evaluated(found)
        yield from self._loggers.flush()
        yield self._trainer.mark_evaluated  # last, so that the next call repeats an unfinished evaluation

    def _show(self, found: EvalResult) -> None:
        error = f" ± {found.standard_error / math.log(2):.3f}" if found.standard_error is not None else ""
        self._progress.say(f"step {found.step}: held out {found.bits_per_token:.3f}{error} bits per token")


def _not_evaluated(trainer: Any) -> Fitting[bool]:
    """Whether the run's current step was trained in its current lineage and was not evaluated yet."""
    step = trainer.step
    if not step or trainer.evaluated == (trainer.lineage, step):
        return False
    try:
        page = yield partial(trainer.steps_page, lineage=trainer.lineage, first_step=step, last_step=step)
    except UnimplementedError:  # an older server does not record evaluations
        return False
    return bool(page.steps)
