"""The tolerances of a replay in environments where results are not reproducible.

The tolerances are 1.3 to 4.6 times the largest drift measured over 3,000 replayed steps, the number of steps
in a checkpoint interval of 300 seconds at 10 steps per second. docs/durability.md has the measurement and
the command that repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.journal.records import StepRecord
from maskwire_server.results import StepResult


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences between a record and its recomputation that rounding can explain."""

    generator_loss: float
    critic_loss: float
    gradient_norm: float

    def after(self, steps: float) -> Tolerance:
        """The tolerance for the next step after `steps` steps, counted in `measured_steps`, were recomputed.

        It grows with `steps`, as the drift from rounding does. A wrong checkpoint or seed causes a large
        difference at the first step, where only 5 % of the full tolerance is allowed.
        """
        share = min(1.0, (_AT_ONCE + steps) / _REACHED)
        return Tolerance(share * self.generator_loss, share * self.critic_loss, share * self.gradient_norm)


_AT_ONCE, _REACHED = 50, 1000  # 5 % of the tolerance at the first step, all of it from the 951st on
_MEASURED_RATE = 1e-3  # the learning rate that the drift was measured at


def measured_steps(learning_rate: float) -> float:
    """The number of steps at a learning rate of 1e-3 that drift as far as one step at `learning_rate`.

    At least 1. The drift was measured at 1e-3. A step changes the weights, and amplifies rounding errors, in
    proportion to its learning rate.
    """
    return max(1.0, learning_rate / _MEASURED_RATE)


TOLERANCES = {
    "fp32": Tolerance(0.06, 0.3, 0.3),
    "tf32": Tolerance(0.06, 0.3, 0.3),
    "bf16": Tolerance(0.1, 0.5, 0.4),
}
"""The full tolerance, by the precision in the fingerprint."""

SMALL = 0.1
"""A smaller loss or norm may differ by as much as a loss or norm of this value."""
_FLIP = 4.0
"""The largest change of the critic's loss by one sampled token that rounding changed, times the positions.

The unit is nats. The positions are those of the batch.
"""
_NORM_FLIP = 16.0
"""The largest relative change of the gradient norm by changed tokens, times the batch's positions.

11.2 was measured, at ten times the learning rate, where the model predicts the other tokens well and they add
little to the norm.
"""


def outcome_differs(record: StepRecord, result: StepResult) -> bool:
    """Whether a recomputed step has another outcome than its record, which no tolerance allows."""
    return result.outcome is not record.outcome


def excess(record: StepRecord, result: StepResult, tolerance: Tolerance, tokens: int) -> str | None:
    """Describe the first number that differs from the record by more than the tolerance; None if none does.

    `tokens` is the number of positions in the batch. The critic's inputs are sampled from the generator, and
    a sampled token that rounding changed has more weight in a smaller batch.
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
        return f"{name} {computed!r}, but {recorded!r} was acknowledged (relative tolerance {relative:g})"
    return None
