"""The device thread: it owns the trainer, and does one thing after another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload, Prompts
from maskwire_server.checkpoints.store import Snapshot
from maskwire_server.engine.entries import Evaluation
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.errors import DeviceLost, MaskwireError
from maskwire_server.results import (
    EvalOptions,
    EvalResult,
    GenerateOptions,
    GenerationState,
    ModelInfo,
    Outcome,
    StepResult,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

HALT_AFTER = 3  # steps in a row that are not finite


class Trainer(Protocol):
    """What the engine needs of a trainer. It is built and used on the device thread alone."""

    @property
    def info(self) -> ModelInfo:
        """What is served."""

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""

    def use_threads(self, count: int) -> None:
        """Compute with so many threads: sums come out otherwise with another number."""

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still computes after an error that came out of another method."""

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Go on under another [optimizer] section, as another version of the mathematics computed.

        ValueError names a key of the section that the state cannot follow.
        """

    def warm_up(self) -> None:
        """Compute a step and throw it away."""

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Apply one step; StateLost if the update failed half-way."""

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        """Evaluate; changes nothing. Raises Unwanted soon after it is no longer wanted."""

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Fill prompts in, a state after each pass; changes nothing, and may be left between two."""

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint over; ValueError if it does not fit."""


class Device:
    """Hands work to the device thread; `submit` and `outstanding` are the engine's thread's."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="maskwire-device")
        self._built: Trainer | None = None
        self._at = 0  # the step that the trainer's state is at
        self.non_finite = 0
        """Steps in a row, up to that one, that were not finite; changed from outside only between steps."""
        self.outstanding = 0
        """Jobs handed over whose end was not yet heard of."""

    def submit(self, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """Run `work` on the device thread, then `done` with its future on the engine's.

        Raises DeviceLost there in place of `done`.
        """
        self.outstanding += 1

        def hear(future: Future[T]) -> None:
            self.outstanding -= 1
            error = future.exception()
            if isinstance(error, DeviceLost):
                raise error
            done(future)

        submitted = self._thread.submit(self._checked, work)
        submitted.add_done_callback(lambda future: self._post(lambda: hear(future)))

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the device thread and wait for it."""
        return self._thread.submit(self._checked, work).result()

    def _checked(self, work: Callable[[], T]) -> T:
        """Run `work`; DeviceLost when it fails with an error that the device does not come back from."""
        try:
            return work()
        except MaskwireError:
            raise
        except Exception as error:
            if self._built is None or self._built.usable_after(error):
                raise
            log.critical(
                "the device does not compute any more (%s): the process ends, and a restart recovers the run",
                str(error).partition("\n")[0] or type(error).__name__,
            )
            raise DeviceLost("the device does not compute any more") from error

    def close(self) -> None:
        """Wait for what runs, and end the thread."""
        self._thread.shutdown(wait=True)

    @property
    def _trainer(self) -> Trainer:
        assert self._built is not None, "the trainer is built first"
        return self._built

    # Work, for the device thread.

    def build(
        self, factory: Callable[[], Trainer], threads: int | None = None
    ) -> tuple[ModelInfo, dict[str, str]]:
        """Build the trainer, pinned to `threads` if they are given: what it serves, and what it runs on."""
        self._built = factory()
        if threads is not None:
            self._trainer.use_threads(threads)
        return self._trainer.info, self._trainer.versions

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Go on under another [optimizer] section and numerics version."""
        self._trainer.configure(optimizer, numerics_version)

    def begin_at(self, step: int, non_finite: int) -> None:
        """Get ready for the step after `step`."""
        self._trainer.warm_up()
        self._at, self.non_finite = step, non_finite

    def train(self, lineage: int, number: int, payload: Payload) -> StepResult | None:
        """Compute a step; None when it must not be.

        Its predecessor was not consumed, or the run halts with it: the device is a step ahead of whoever
        counts, and must not go on by itself.
        """
        if number != self._at + 1 or self.non_finite >= HALT_AFTER:
            return None
        result = self._trainer.train_step(lineage, number, payload.batch, payload.modes)
        self._at = number
        skipped = result.outcome is Outcome.SKIPPED_NON_FINITE
        self.non_finite = self.non_finite + 1 if skipped else 0
        return result

    def pass_over(self, number: int, result: StepResult) -> StepResult | None:
        """Consume a step without computing it; None when its predecessor was not consumed."""
        if number != self._at + 1 or self.non_finite >= HALT_AFTER:
            return None
        self._at, self.non_finite = number, 0
        return result

    def replay(self, lineage: int, number: int, payload: Payload) -> StepResult:
        """Compute a recorded step again."""
        return self._trainer.train_step(lineage, number, payload.batch, payload.modes)

    def evaluate(self, job: Evaluation) -> EvalResult:
        """Evaluate a batch; Unwanted when its client went away meanwhile."""
        request = job.request
        return self._trainer.eval_loss(request.batch, request.options, lambda: not job.future.done())

    def generate(self, generation: Generation) -> None:
        """Make passes until the rows are finished or nobody wants another."""
        if generation.over:
            return
        request = generation.request
        for state in self._trainer.generate(request.prompts, request.options):
            if not generation.put(state):
                return

    def snapshot(self) -> Snapshot:
        """Copy the state to host memory."""
        failpoints.passing("checkpoint.copying")
        copy = self._trainer.snapshot()
        failpoints.passing("checkpoint.copied")
        return copy

    def load(self, folder: Path, step: int) -> None:
        """Take over a checkpoint of `step`."""
        self._trainer.load(folder)
        self._at, self.non_finite = step, 0
