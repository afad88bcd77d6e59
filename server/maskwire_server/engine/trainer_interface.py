"""The trainer interface that the engine needs, and the guard that detects a lost device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from maskwire.v1.values import ModelInfo
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Prompts
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.errors import DeviceLost, MaskwireError
from maskwire_server.recovery.trainer_interface import ReplayTrainer
from maskwire_server.results import EvalOptions, EvalResult, GenerateOptions, GenerationState

log = logging.getLogger(__name__)


class Trainer(ReplayTrainer, Protocol):
    """Built and used on the executor's thread."""

    @property
    def info(self) -> ModelInfo:
        """The model."""

    @property
    def read_tokens(self) -> int:
        """Default of `Limits.max_read_tokens` for this model and device."""

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still works after an error that another method raised."""

    def warm_up(self) -> None:
        """Compute a step and discard it."""

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate one batch. Raises Unwanted soon after `wanted` returns False."""

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool]
    ) -> Iterator[GenerationState]:
        """Sample unknown positions of prompts. Yields a state after each pass; the caller may then stop.

        Raises Unwanted soon after `wanted` returns False, also within a pass.
        """


@contextlib.contextmanager
def guarded(trainer: Trainer) -> Iterator[None]:
    """Raise DeviceLost if an error has made the device unusable. Every use of the device is guarded."""
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
        raise DeviceLost("the device has failed") from error


def snapshot(trainer: Trainer) -> Snapshot:
    """Copy the trainer's state to host memory."""
    failpoints.passing("checkpoint.copying")
    with guarded(trainer):
        copy = trainer.snapshot()
    failpoints.passing("checkpoint.copied")
    return copy
