"""Decodes the figures in a status report: what the server has counted since its process started."""

from __future__ import annotations

from maskwire import results
from maskwire.v1 import training_service_pb2 as pb


def read(status: pb.GetStatusResponse) -> results.RunFigures:
    """Return the figures in a status report. Figures that an older server does not report are empty."""
    seconds = status.step_seconds if status.HasField("step_seconds") else None
    return results.RunFigures(
        newest_step=_newest(status.newest_step) if status.HasField("newest_step") else None,
        steps=dict(status.steps_total),
        tokens=status.tokens_total,
        queue_seconds=None if seconds is None else seconds.queue_seconds,
        compute_seconds=None if seconds is None else seconds.compute_seconds,
        commit_seconds=None if seconds is None else seconds.commit_seconds,
        recovery_seconds=dict(status.recovery_seconds),
        events_dropped=dict(status.events_dropped),
        refused_calls=dict(status.refused_calls),
    )


def _newest(step: pb.NewestStep) -> results.NewestStep:
    losses = step.losses
    return results.NewestStep(
        step.step,
        results.Outcome(step.outcome),
        results.Losses(
            losses.loss,
            losses.generator_loss if losses.HasField("generator_loss") else None,
            losses.critic_loss if losses.HasField("critic_loss") else None,
        ),
        step.gradient_norm if step.HasField("gradient_norm") else None,
        step.learning_rate,
    )
