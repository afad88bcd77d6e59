"""The steps that a training loop has sent and whose results it has not yet received."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

from maskwire.errors import ConflictError, MaskwireError
from maskwire.loggers.progress import TrainingProgress
from maskwire.loggers.records import step_record
from maskwire.protocol.fit_actions import Fitting, ResultOf
from maskwire.protocol.fit_callbacks import Callbacks
from maskwire.protocol.fit_loggers import Loggers
from maskwire.protocol.fit_result import FitResult
from maskwire.protocol.fit_step_inputs import StepInputs

LEAVE_SECONDS = 10.0  # how long to wait after Ctrl-C for the steps in flight


class FitWindow:
    """Submits steps while earlier steps are in flight, and receives the results in the order of the steps."""

    def __init__(
        self,
        trainer: Any,
        inputs: StepInputs,
        result: FitResult,
        progress: TrainingProgress,
        loggers: Loggers,
        callbacks: Callbacks,
    ) -> None:
        self._trainer, self._inputs, self._result = trainer, inputs, result
        self._progress, self._loggers, self._callbacks = progress, loggers, callbacks
        self._in_flight: deque[tuple[int, Any]] = deque()

    def train(self, until_step: int) -> Fitting[None]:
        """Train up to and including `until_step`, with as many steps in flight as the trainer allows."""
        for step in range(self._result.step + 1, until_step + 1):
            given = self._inputs.of_step(step)
            try:
                future = yield partial(self._trainer.submit, given.rows, step=step, **given.options)
            except ConflictError:
                while self._in_flight:  # the future of the step that was refused first raises the cause
                    yield from self._take()
                raise
            self._in_flight.append((given.tokens, future))
            while self._in_flight and self._in_flight[0][1].done():
                yield from self._take()
        while self._in_flight:
            yield from self._take()

    def finish(self) -> Fitting[None]:
        """Wait for all steps in flight, and record their results. Called after StopTraining.

        The callback that raised StopTraining no longer receives these steps in `on_step`.
        """
        while self._in_flight:
            yield from self._take()

    def leave(self) -> Fitting[int]:
        """Wait at most LEAVE_SECONDS for the steps in flight; return how many are still in flight."""
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            while self._in_flight:
                yield from self._take(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, MaskwireError):
            pass
        return len(self._in_flight)

    def forget(self) -> None:
        """Mark the errors of abandoned steps as retrieved, so that asyncio does not report them."""
        for _, future in self._in_flight:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _take(self, timeout: float | None = None) -> Fitting[None]:
        """Wait for the first step in flight, record its result and call the callbacks."""
        tokens, future = self._in_flight[0]
        answer = yield ResultOf(future, timeout)
        self._in_flight.popleft()
        result = self._result
        result.step, result.last = answer.step, answer
        result.tokens += tokens
        self._loggers.write(step_record(self._trainer.run_id, self._trainer.lineage, answer, tokens))
        note = "" if answer.outcome.name == "APPLIED" else answer.outcome.name
        self._progress.update(answer.step, answer.loss, tokens, note)
        yield from self._callbacks.step(answer)
