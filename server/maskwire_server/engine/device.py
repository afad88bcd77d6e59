"""The trainer as the run uses it, on the one thread that may."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.errors import DeviceLost, MaskwireError
from maskwire_server.results import (
    EvalOptions,
    EvalResult,
    GenerateOptions,
    GenerationState,
    ModelInfo,
    StepResult,
)

log = logging.getLogger(__name__)


class Trainer(Protocol):
    """What the run needs of a trainer. It is built and used on one thread."""

    @property
    def info(self) -> ModelInfo:
        """What is served."""

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""

    def use_threads(self, count: int) -> None:
        """Compute with so many threads: another number gives other sums."""

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still computes after an error that came out of another method."""

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Continue under another [optimizer] section, as another version of the mathematics computed.

        ValueError names a key of the section that the state cannot follow.
        """

    def warm_up(self) -> None:
        """Compute a step and discard it."""

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Apply one step; StateLost if the update failed half-way."""

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate; changes nothing. Raises Unwanted soon after it is no longer wanted."""

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Fill prompts in, a state after each pass; changes nothing, and may be left between two."""

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""

    def load(self, folder: Path) -> None:
        """Take over the state of a checkpoint; ValueError if it does not fit."""


class Device:
    """The trainer, with errors that its device does not recover from raised as DeviceLost."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._trainer.info

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""
        return self._trainer.versions

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except MaskwireError:
            raise
        except Exception as error:
            if self._trainer.usable_after(error):
                raise
            log.critical(
                "the device does not compute any more (%s): the process ends, and a restart recovers the run",
                str(error).partition("\n")[0] or type(error).__name__,
            )
            raise DeviceLost("the device does not compute any more") from error

    def use_threads(self, count: int) -> None:
        """Compute with so many threads."""
        self._trainer.use_threads(count)

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Continue under another [optimizer] section and numerics version."""
        with self._watched():
            self._trainer.configure(optimizer, numerics_version)

    def warm_up(self) -> None:
        """Compute a step and discard it."""
        with self._watched():
            self._trainer.warm_up()

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Apply one step."""
        with self._watched():
            return self._trainer.train_step(lineage, step, batch, modes)

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate."""
        with self._watched():
            return self._trainer.eval_loss(batch, options, wanted)

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Fill prompts in."""
        with self._watched():
            yield from self._trainer.generate(prompts, options)

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""
        failpoints.passing("checkpoint.copying")
        with self._watched():
            copy = self._trainer.snapshot()
        failpoints.passing("checkpoint.copied")
        return copy

    def load(self, folder: Path) -> None:
        """Take over a checkpoint."""
        with self._watched():
            self._trainer.load(folder)


def build(factory: Callable[[], Trainer], threads: int | None = None) -> Device:
    """Build the trainer, pinned to `threads` if they are given."""
    device = Device(factory())
    if threads is not None:
        device.use_threads(threads)
    return device
