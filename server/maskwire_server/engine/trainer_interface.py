"""The trainer interface that the engine needs, and the guard that detects a lost device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from maskwire.v1.values import ModelInfo
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.errors import DeviceLost, MaskwireError
from maskwire_server.recovery.trainer_interface import ReplayTrainer
from maskwire_server.results import EvalOptions, EvalResult, GenerateOptions, GenerationState, StepResult

log = logging.getLogger(__name__)


class Trainer(ReplayTrainer, Protocol):
    """The trainer that the engine needs. It is built and used on the executor's thread."""

    @property
    def info(self) -> ModelInfo:
        """A description of the model."""

    @property
    def read_tokens(self) -> int:
        """The default of `Limits.max_read_tokens` for this model and device."""

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still works after an error that another method raised."""

    def warm_up(self) -> None:
        """Compute a training step, and discard its result."""

    def prepare_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> None:
        """Do the part of a step that does not depend on the weights. `train_step` then does the rest.

        The next call of `train_step` uses it if it has the same arguments, and otherwise discards it. Errors
        may be ignored: `train_step` raises them again.
        """

    def train_step(
        self, lineage: int, step: int, batch: Batch, modes: Modes, meanwhile: Callable[[], None] | None = None
    ) -> StepResult:
        """Compute one training step and update the weights.

        `meanwhile` may be called while the device computes. It may call `prepare_step`, and raises no errors.
        """

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate one batch. Raises Unwanted soon after `wanted` returns False."""

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool]
    ) -> Iterator[GenerationState]:
        """Sample the unknown positions of prompts. Yields a state after each pass.

        The caller may stop after any state. Raises Unwanted soon after `wanted` returns False, even within a
        pass.
        """


@contextlib.contextmanager
def guarded(trainer: Trainer) -> Iterator[None]:
    """Raise DeviceLost in place of an error after which the device is unusable.

    Every use of the device runs in this context.
    """
    try:
        yield
    except MaskwireError:
        raise
    except Exception as error:
        if trainer.usable_after(error):
            raise
        log.critical(
            "the device has failed (%s): the server exits; restart it to recover the run",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        raise DeviceLost("the device has failed; restart the server to recover the run") from error


def snapshot(trainer: Trainer) -> Snapshot:
    """Copy the trainer's state to host memory, and return the copy."""
    failpoints.passing("checkpoint.copying")
    with guarded(trainer):
        copy = trainer.snapshot()
    failpoints.passing("checkpoint.copied")
    return copy
