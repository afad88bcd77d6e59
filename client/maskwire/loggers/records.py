"""The records of a run's history that loggers write, each with its run, lineage and step.

A record is a dict that can be written as JSON. The kinds of records:

    a step            losses, gradient norm, learning rate, times, tokens, outcome, digest
    an evaluation     `eval_bits_per_token` and its standard error
    "started"         an `event`: the log begins after this step
    "restored"        an `event`: a new lineage begins after this step
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from maskwire.results import EvalResult, Losses, RecordedStep, StepResult, StepsPage

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A position in a run's history."""

    run_id: str
    """The run's id."""
    lineage: int
    """The number of the lineage."""
    step: int
    """The step; 0: before the first step."""
    digest: str = ""
    """Only for a log that does not name its run: the digest after the step, which identifies the run."""

    @property
    def order(self) -> tuple[int, int]:
        """(lineage, step), which sorts places in the order of their run's history."""
        return self.lineage, self.step


def step_record(run_id: str, lineage: int, answer: StepResult, tokens: int) -> Record:
    """Return the record of a trained step. Numbers that are not finite become None."""
    return {
        "run_id": run_id,
        "lineage": lineage,
        "step": answer.step,
        **_losses(answer.losses),
        **_finite(
            gradient_norm=answer.metrics.gradient_norm,
            learning_rate=answer.metrics.learning_rate,
            compute_seconds=answer.metrics.compute_seconds,
        ),
        "tokens": tokens,
        "outcome": answer.outcome.name,
        "digest": answer.digest.hex(),
        "time": time.time(),
    }


def evaluation_record(run_id: str, lineage: int, found: EvalResult) -> Record:
    """Return the record of an evaluation."""
    error = found.standard_error
    return {
        "run_id": run_id,
        "lineage": lineage,
        "step": found.step,
        "eval_bits_per_token": found.bits_per_token,
        "eval_standard_error_bits": None if error is None else error / math.log(2),
        "time": time.time(),
    }


def filled_in_record(run_id: str, step: RecordedStep) -> Record:
    """Return the record of a step that the log lacks, from the server's record of the step.

    Values that the server does not keep are None.
    """
    return {
        "run_id": run_id,
        "lineage": step.lineage,
        "step": step.step,
        **_losses(step.losses),
        **_finite(gradient_norm=step.gradient_norm, learning_rate=None, compute_seconds=None),
        "tokens": None,
        "outcome": step.outcome.name,
        "digest": step.digest.hex(),
        "time": None,
        "filled_in": True,
    }


def started_record(place: Place, digest: bytes) -> Record:
    """Return the record that marks where a log begins. `digest` is the history digest there."""
    return {
        "run_id": place.run_id,
        "lineage": place.lineage,
        "step": place.step,
        "event": "started",
        "digest": digest.hex(),
        "time": time.time(),
    }


def restored_record(page: StepsPage) -> Record:
    """Return the record that marks where a restore started a lineage, from a page of the lineage's steps."""
    return {
        "run_id": page.run_id,
        "lineage": page.lineage,
        "step": page.start_step,
        "event": "restored",
        "parent_lineage": page.parent_lineage,
        "checkpoint": page.checkpoint or None,
        "time": time.time(),
    }


_CHARTS = {
    "loss": "train/loss",
    "generator_loss": "train/generator_loss",
    "critic_loss": "train/critic_loss",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "compute_seconds": "train/compute_seconds",
    "tokens": "train/tokens",
    "eval_bits_per_token": "eval/bits_per_token",
    "eval_standard_error_bits": "eval/standard_error_bits",
}
"""Fields of a record that are drawn as curves, and the names of the curves."""


def scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a step's or an evaluation's record by curve name, without absent numbers."""
    return {
        chart: float(value)
        for name, chart in _CHARTS.items()
        if (value := record.get(name)) is not None and "event" not in record
    }


def is_evaluation(record: Record) -> bool:
    """Whether a record describes an evaluation."""
    return "eval_bits_per_token" in record


def same_step(record: Record, other: Record) -> bool:
    """Whether two records have the same run, lineage and step."""
    return all(str(record[key]) == str(other.get(key)) for key in ("run_id", "lineage", "step"))


def _losses(losses: Losses) -> dict[str, float | None]:
    return _finite(loss=losses.loss, generator_loss=losses.generator_loss, critic_loss=losses.critic_loss)


def _finite(**numbers: float | None) -> dict[str, float | None]:
    return {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
