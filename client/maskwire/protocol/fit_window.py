"""The steps that a training loop has in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from maskwire.arguments import call_back, check_rows
from maskwire.batch import Batch
from maskwire.errors import ConflictError, MaskwireError
from maskwire.loggers.metrics import Metrics, step_line
from maskwire.loggers.progress import TrainingProgress
from maskwire.protocol.effects import Work
from maskwire.results import EvalResult, StepResult

T = TypeVar("T")

LEAVE_SECONDS = 10.0  # for the steps in flight after Ctrl-C


class Data(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Any:
        """Return the rows to train on at a step, or a Batch. Must depend on nothing but the step."""


@dataclass
class FitResult:
    """What a call of `fit` did."""

    first_step: int
    step: int
    """The last step trained."""
    seconds: float = 0.0
    """Duration of the call, with evaluations, checkpoints and waits."""
    seconds_waited: float = 0.0
    """Seconds of it for which the server did not answer or refused to work, each reported by `on_wait`."""
    tokens: int = 0
    """Tokens sent, prompts included and padding excluded."""
    interrupted: bool = False
    """Ctrl-C ended it."""
    stopped: bool = False
    """StopTraining ended it."""
    last: StepResult | None = None
    evaluations: list[EvalResult] = field(default_factory=list)
    metrics_failure: str = ""
    """Why lines of the metrics file are missing, such as a full disk; empty: none is missing."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens sent per second of the call, evaluations and checkpoints included, waits excluded."""
        seconds = self.seconds - self.seconds_waited
        return self.tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class ResultOf:
    """An action: wait for the result of a step in flight, for at most `timeout` seconds."""

    future: Any
    timeout: float | None


# What a training loop asks its driver to do. A plain callable is called, and awaited where it can be.
Action = ResultOf | Work | Callable[[], Any]
Fitting = Generator[Action, Any, T]


class FitWindow:
    """Submits a step's batch while earlier steps are in flight, and takes their results in order."""

    def __init__(
        self,
        trainer: Any,
        data: Data,
        result: FitResult,
        progress: TrainingProgress,
        on_step: Callable[[StepResult], None] | None,
        options: dict[str, Any],
    ) -> None:
        self._trainer, self._data, self._result = trainer, data, result
        self._progress, self._on_step, self._options = progress, on_step, options
        self.metrics: Metrics | None = None
        self._in_flight: deque[tuple[int, Any]] = deque()

    def train(self, until_step: int) -> Fitting[None]:
        """Train up to and including a step, with as many steps in flight as the trainer allows."""
        for step in range(self._result.step + 1, until_step + 1):
            batch, tokens = self._batch(step)
            given = {"lengths": batch.lengths, "prompt_mask": batch.prompt_mask}
            options = self._options | {name: value for name, value in given.items() if value is not None}
            try:
                future = yield partial(self._trainer.submit, batch.tokens, step=step, **options)
            except ConflictError:
                while self._in_flight:  # the step that was refused raises the cause
                    yield from self._take()
                raise
            self._in_flight.append((tokens, future))
            while self._in_flight and self._in_flight[0][1].done():
                yield from self._take()
        while self._in_flight:
            yield from self._take()

    def _batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, and how many tokens it has."""
        found = call_back("data.batch", self._data.batch, step)
        batch = found if isinstance(found, Batch) else Batch(found)
        rows = batch.tokens
        if rows is None:
            raise TypeError(f"data.batch({step}) must return rows of token ids, it returned None")
        check_rows(rows, f"data.batch({step})")
        try:
            if batch.lengths is not None:
                return batch, int(sum(batch.lengths))
            return batch, sum(len(row) for row in rows)
        except TypeError as error:
            raise TypeError(
                f"data.batch({step}) must return rows of token ids, it returned ids that are in no row: "
                "return [row] for a batch of one row"
            ) from error

    def finish(self) -> Fitting[None]:
        """Take the steps in flight without calling `on_step`, which raised StopTraining."""
        self._on_step = None
        while self._in_flight:
            yield from self._take()

    def leave(self) -> Fitting[int]:
        """Wait a little for the steps in flight; return how many were left."""
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            while self._in_flight:
                yield from self._take(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, MaskwireError):
            pass
        return len(self._in_flight)

    def forget(self) -> None:
        """Mark the errors of abandoned steps as seen, so that asyncio does not report them."""
        for _, future in self._in_flight:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _take(self, timeout: float | None = None) -> Fitting[None]:
        """Wait for the first step in flight and record its result."""
        tokens, future = self._in_flight[0]
        answer = yield ResultOf(future, timeout)
        self._in_flight.popleft()
        result = self._result
        result.step, result.last = answer.step, answer
        result.tokens += tokens
        if self.metrics is not None:
            self.metrics.write(step_line(self._trainer.run_id, self._trainer.lineage, answer, tokens))
        note = "" if answer.outcome.name == "APPLIED" else answer.outcome.name
        self._progress.update(answer.step, answer.loss, tokens, note)
        if self._on_step is not None:
            call_back("on_step", self._on_step, answer)
