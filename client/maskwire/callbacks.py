"""Callbacks of `fit`: the methods that it calls, and the callbacks that the library provides.

A callback is any object with one or more of these methods. Each is called on the thread that called `fit`.
With `maskwire.aio` a method may be a coroutine function; the blocking client refuses coroutine functions.

    on_start(trainer)     before the first step of this call of `fit`
    on_step(result)       after each step, with its StepResult; later steps may be in flight
    on_evaluate(result)   after each evaluation, with its EvalResult; no step is in flight
    on_checkpoint(info)   after each checkpoint that `fit` or a callback saved, with its CheckpointInfo
    on_end(result)        when `fit` ends, even with an error, with its FitResult

A method that saves a checkpoint with `trainer.checkpoint(...)` should return the result: `fit` then reports
the checkpoint.

A callback ends `fit` if it raises StopTraining, or a MaskwireError: such an error comes from a call of
maskwire, and concerns the run rather than the callback. After any other exception training continues, but the
callback is not called again. The exception is reported in the progress output, the log and
`FitResult.failures`.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import Any

from maskwire.arguments import check_flag, check_real, check_whole
from maskwire.results import CheckpointInfo, EvalResult
from maskwire.signatures import refuse_unknown_keywords

HOOKS = ("on_start", "on_step", "on_evaluate", "on_checkpoint", "on_end")
"""The methods that a callback may have."""


@refuse_unknown_keywords
class StopTraining(Exception):
    """An exception that a callback, `evaluate`, `data.batch` or `learning_rate` raises to end `fit` early.

    `fit` waits for the steps in flight, at most one window, and saves a checkpoint of the last step, unless
    `checkpoint=False`. The result of `fit` has `.stopped` set, and this exception's text as `.stop_reason`.
    """

    def __init__(self, *reason: object, checkpoint: bool = True) -> None:
        """Make the exception.

        reason: Why, in words.
        checkpoint: Whether to save a checkpoint of the step that the run is at.
        """
        check_flag("checkpoint", checkpoint)
        super().__init__(*reason)
        self.checkpoint = checkpoint


@refuse_unknown_keywords
class EarlyStopping:
    """Ends training when the evaluations have stopped improving."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        """Stop after `patience` evaluations in a row that are not better than the best earlier one.

        patience: The number of such evaluations.
        min_delta: An evaluation is better if its `nats_per_token` is lower by more than this.

        Evaluations of earlier calls of `fit` do not count. Raises ValueError for a patience below 1 and a
        min_delta below 0, and TypeError for a min_delta that is not a number.
        """
        check_whole("patience", patience, 1)
        check_real("min_delta", min_delta, " of nats per token")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta must be finite and at least 0, in nats per token, got {min_delta!r}")
        self._patience, self._min_delta = patience, float(min_delta)
        self._best = math.inf
        self._waited = 0

    def on_start(self, trainer: Any) -> None:  # noqa: ARG002
        """Forget the evaluations of an earlier call of `fit`."""
        self._best, self._waited = math.inf, 0

    def on_evaluate(self, result: EvalResult) -> None:
        """Count evaluations in a row without improvement. Raises StopTraining when they are `patience`."""
        if result.nats_per_token < self._best - self._min_delta:
            self._best, self._waited = result.nats_per_token, 0
            return
        self._waited += 1  # also for NaN
        if self._waited >= self._patience:
            seen = self._best < math.inf
            wanted = f"better than {self._best:.4f} nats per token" if seen else "finite; check the losses"
            raise StopTraining(f"{self._patience} evaluations in a row were not {wanted}")


@refuse_unknown_keywords
class SaveBest:
    """Saves a checkpoint after each evaluation that is the best so far.

    The checkpoint's score is the `nats_per_token` of the evaluation. The best score so far is read from the
    run's checkpoints, so that it survives a restart of the client. The server keeps the checkpoints with the
    best scores; the setting `checkpoints.keep_best` says how many.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._best = math.inf

    # These methods yield their calls, and `fit` makes them: calls of the asyncio client must be awaited.

    def on_start(self, trainer: Any) -> Generator[Any, Any, None]:
        """Read the best score so far from the run's checkpoints."""
        self._trainer = trainer
        saved = yield trainer.checkpoints
        self._best = min([info.score for info in saved if info.score is not None], default=math.inf)

    def on_evaluate(self, result: EvalResult) -> Generator[Any, Any, CheckpointInfo | None]:
        """Save a checkpoint if the evaluation is the best so far, and return its CheckpointInfo."""
        if not result.nats_per_token < self._best:
            return None
        trainer = self._trainer
        saved: CheckpointInfo = yield partial(
            trainer.checkpoint,
            score=result.nats_per_token,
            expected_lineage=trainer.lineage,
            expected_step=result.step,
        )
        self._best = result.nats_per_token
        return saved
