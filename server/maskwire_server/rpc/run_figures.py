"""Encodes the figures of a run for the answer to GetStatus."""

from __future__ import annotations

from collections import Counter
from typing import Any

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.events import StepCommitted
from maskwire_server.run_figures import Recent, RunFigures


def fields(value: RunFigures) -> dict[str, Any]:
    """Encode the figures of a run as fields of GetStatusResponse, by name."""
    refused: Counter[str] = Counter()
    for (_, _, reason), count in value.calls.items():
        if reason:
            refused[reason] += count
    return {
        "newest_step": None if value.newest_step is None else _newest(value.newest_step),
        "steps_total": {outcome.name: count for outcome, count in value.steps.items()},
        "tokens_total": value.tokens,
        "step_seconds": _seconds(value.recent),
        "recovery_seconds": value.recovery_seconds,
        "events_dropped": value.events_dropped,
        "refused_calls": refused,
    }


def _newest(step: StepCommitted) -> pb.NewestStep:
    losses = step.losses
    return pb.NewestStep(
        step=step.step,
        outcome=pb.StepOutcome.Name(step.outcome),
        losses=pb.Losses(
            loss=losses.loss, generator_loss=losses.generator_loss, critic_loss=losses.critic_loss
        ),
        gradient_norm=step.gradient_norm,
        learning_rate=step.learning_rate,
    )


def _seconds(recent: Recent) -> pb.StepSeconds | None:
    if recent.queue_seconds is None or recent.compute_seconds is None or recent.commit_seconds is None:
        return None
    return pb.StepSeconds(
        queue_seconds=recent.queue_seconds,
        compute_seconds=recent.compute_seconds,
        commit_seconds=recent.commit_seconds,
    )
