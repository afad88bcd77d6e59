"""The trainer's interface, and the guard that detects a lost device."""

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
    """What the engine needs of a trainer. It is built and used on the executor's thread."""

    @property
    def info(self) -> ModelInfo:
        """What is served."""

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of the device and libraries it runs on."""

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads. Results depend on the number: sums are split differently."""

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still works after an error that another method raised."""

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Continue with another [optimizer] section and numerics version.

        Raises ValueError naming a key of the section that is incompatible with the state.
        """

    def warm_up(self) -> None:
        """Compute a step and discard it."""

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Apply one step. Raises StateLost if the update failed half-way."""

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate one batch. Raises Unwanted soon after `wanted` returns False."""

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Sample unknown positions of prompts; yields a state after each pass, and may be abandoned then."""

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""

    def load(self, folder: Path) -> None:
        """Load the state of a checkpoint. Raises ValueError if it does not fit the model."""


class Device:
    """The trainer. Errors after which the device is unusable are raised as DeviceLost."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._trainer.info

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of the device and libraries it runs on."""
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
                "the device has failed (%s): the process ends, and a restart recovers the run",
                str(error).partition("\n")[0] or type(error).__name__,
            )
            raise DeviceLost("the device has failed") from error

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads."""
        self._trainer.use_threads(count)

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Continue with another [optimizer] section and numerics version."""
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
        """Evaluate one batch."""
        with self._watched():
            return self._trainer.eval_loss(batch, options, wanted)

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Sample the unknown positions of prompts."""
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
        """Load the state of a checkpoint."""
        with self._watched():
            self._trainer.load(folder)


def build(factory: Callable[[], Trainer], threads: int | None = None) -> Device:
    """Build the trainer, and pin its number of threads if `threads` is given."""
    device = Device(factory())
    if threads is not None:
        device.use_threads(threads)
    return device
