"""Tolerances of replay, for environments where results are not reproducible.

The tolerances are 1.3 to 4.6 times the largest drift measured over 3,000 replayed steps: a checkpoint
interval of 300 seconds at 10 steps per second. docs/durability.md has the measurement, and the command
that repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.journal.records import StepRecord
from maskwire_server.results import StepResult


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    generator_loss: float
    critic_loss: float
    gradient_norm: float

    def after(self, steps: float) -> Tolerance:
        """The tolerance after this many `measured_steps` were computed again.

        Drift grows with the number of steps, while a wrong checkpoint or seed shows at once.
        """
        share = min(1.0, (_AT_ONCE + steps) / _REACHED)
        return Tolerance(share * self.generator_loss, share * self.critic_loss, share * self.gradient_norm)


_AT_ONCE, _REACHED = 50, 1000  # 5 % of the tolerance at the first step, all of it from the 951st on
_MEASURED_RATE = 1e-3  # the learning rate that the drift was measured at


def measured_steps(learning_rate: float) -> float:
    """How many steps at the measured learning rate drift as far as one step at this rate; at least 1.

    A step moves the weights, and amplifies rounding, in proportion to its learning rate.
    """
    return max(1.0, learning_rate / _MEASURED_RATE)


TOLERANCES = {
    "fp32": Tolerance(0.06, 0.3, 0.3),
    "tf32": Tolerance(0.06, 0.3, 0.3),
    "bf16": Tolerance(0.1, 0.5, 0.4),
}
"""The full tolerance, by the precision in the fingerprint."""

SMALL = 0.1
"""Losses below this are compared absolutely."""
_FLIP = 4.0
"""The most that one sampled token, changed by rounding, changes the critic's loss, times the positions.

In nats; the positions are those of the batch.
"""
_NORM_FLIP = 16.0
"""The most that changed tokens change the gradient norm, as a share of it, times the batch's positions.

Measured: 11.2, at ten times the learning rate, where the other tokens are learned and add little to the norm.
"""


def outcome_differs(record: StepRecord, result: StepResult) -> bool:
    """Whether the step had another outcome: no tolerance covers that."""
    return result.outcome is not record.outcome


def excess(record: StepRecord, result: StepResult, tolerance: Tolerance, tokens: int) -> str | None:
    """The first number that differs from the record by more than the tolerance; None: none does.

    A critic's inputs are sampled from the generator, and one token that rounding changes weighs more in a
    smaller batch: `tokens` is the number of positions in the batch.
    """
    was, now = record.losses, result.losses
    flip, norm_flip = 0.0, 0.0
    if was.critic_loss is not None:
        flip, norm_flip = _FLIP / tokens, _NORM_FLIP / tokens * abs(record.gradient_norm or 0.0)
    pairs = [
        ("generator loss", was.generator_loss, now.generator_loss, tolerance.generator_loss, 0.0),
        ("critic loss", was.critic_loss, now.critic_loss, tolerance.critic_loss, flip),
        ("gradient norm", record.gradient_norm, result.gradient_norm, tolerance.gradient_norm, norm_flip),
    ]
    if was.generator_loss is None and was.critic_loss is None:
        pairs.append(("loss", was.loss, now.loss, tolerance.generator_loss, 0.0))
    for name, recorded, computed, relative, absolute in pairs:
        if recorded is None and computed is None:
            continue
        if recorded is not None and computed is not None:
            allowed = relative * max(abs(recorded), SMALL) + absolute
            if abs(recorded - computed) <= allowed:  # False if a number is not finite
                continue
        return f"{name} {computed!r}, acknowledged was {recorded!r}, beyond the tolerance of {relative:g}"
    return None
