"""A trainer that counts, around which the training loop runs without a server."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np

from maskwire.client import run_fit
from maskwire.protocol.fit import FitResult
from maskwire.protocol.fit import fit as training_loop
from maskwire.results import Losses, Outcome, RecordedStep, StepMetrics, StepResult, StepsPage


def fit(trainer: Any, data: Any, **options: Any) -> FitResult:
    return run_fit(trainer, training_loop(trainer, data, **options))


class Counting:
    """As much of a Trainer as `fit` uses; answers come late, in order."""

    def __init__(self, step: int = 0, fail_at: int | None = None) -> None:
        self.run_id = "run"
        self.data: dict[str, str] = {}
        self.seconds_waited = 0.0
        self.lineage = 1
        self.step = step
        self.evaluated = (0, 0)
        self.marked: list[int] = []
        self.handed_in = step
        self.batches: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.fail_at = fail_at
        self.in_flight = 0

    def submit(self, rows: Any, *, step: int, **options: Any) -> Future[StepResult]:
        self.handed_in += 1
        assert step == self.handed_in
        self.in_flight += 1
        self.batches.append(int(rows[0][0]))
        self.options.append(options)
        future: Future[StepResult] = Future()
        threading.Timer(0.002, self._answer, (self.handed_in, future)).start()
        return future

    def _answer(self, step: int, future: Future[StepResult]) -> None:
        self.in_flight -= 1
        if step == self.fail_at:
            future.set_exception(ValueError("bad batch"))
            return
        self.step = max(self.step, step)
        loss = float("nan") if step == 3 else 1 / step
        metrics = StepMetrics(0.5, 0.1, 3, 4, 0.0, 0.01, 0.0)
        outcome = Outcome.SKIPPED_NON_FINITE if step == 3 else Outcome.APPLIED
        future.set_result(StepResult(step, Losses(loss, loss, None), outcome, False, b"d" * 32, metrics))

    def settle(self) -> None:
        assert self.in_flight == 0

    def _check_process(self) -> None:
        """It has no connection to lose."""

    digest = b"d" * 32

    def steps_page(self, *, lineage: int, first_step: int, last_step: int, **_: Any) -> StepsPage:
        losses = Losses(1.0, 1.0, None)
        steps = tuple(
            RecordedStep(lineage, step, Outcome.APPLIED, losses, None, self.digest)
            for step in range(max(1, first_step), last_step + 1)
        )
        return StepsPage(self.run_id, lineage, 0, 0, "", steps, "")

    def mark_evaluated(self) -> None:
        self.evaluated = (self.lineage, self.step)
        self.marked.append(self.step)

    def checkpoints(self) -> list[Any]:
        return [SimpleNamespace(step=step, digest=self.digest) for step in self.saved]

    def checkpoint(self, *, score: float | None = None, expected_lineage: int, expected_step: int) -> Any:
        assert self.in_flight == 0, "a checkpoint is of an exact step"
        assert (expected_lineage, expected_step) == (self.lineage, self.step)
        self.saved.append(self.step)
        return SimpleNamespace(name=f"step-{self.step}")


class Numbered:
    def batch(self, step: int) -> Any:
        return np.full((2, 5), step)


def evaluation(trainer: Counting) -> Any:
    assert trainer.in_flight == 0
    return SimpleNamespace(step=trainer.step, bits_per_token=2.0, standard_error=0.1)
