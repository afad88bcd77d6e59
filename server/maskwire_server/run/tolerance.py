"""How far a step computed again may be from its record where results are not reproducible.

The tolerances are about four times the largest drift measured over 200 replayed steps; docs/durability.md
has the measurement, `tests/robustness/drift.py` repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.results import StepResult
from maskwire_server.run.records import StepRecord


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    generator_loss: float
    critic_loss: float
    gradient_norm: float


TOLERANCES = {
    "fp32": Tolerance(0.002, 0.05, 0.1),
    "tf32": Tolerance(0.002, 0.05, 0.1),
    "bf16": Tolerance(0.01, 0.1, 0.2),
}
"""By the precision of the fingerprint."""

_SMALL = 0.1
"""Below this value differences count against it: near zero the rounding of a loss is absolute."""
_FLIP = 4.0
"""Nats by which one sampled token that rounding flips can change the critic's loss at its positions."""


def outcome_differs(record: StepRecord, result: StepResult) -> bool:
    """Whether the step ended in another way: no tolerance covers that."""
    return result.outcome is not record.outcome


def excess(record: StepRecord, result: StepResult, tolerance: Tolerance, tokens: int) -> str | None:
    """Which number is further from the record than the tolerance allows; None: none is.

    A critic's inputs are sampled from the generator, and one that flips weighs more the smaller the batch:
    `tokens` is the number of positions of the batch.
    """
    was, now = record.losses, result.losses
    flip = _FLIP / tokens if was.critic_loss is not None else 0.0
    pairs = [
        ("generator loss", was.generator_loss, now.generator_loss, tolerance.generator_loss, 0.0),
        ("critic loss", was.critic_loss, now.critic_loss, tolerance.critic_loss, flip),
        ("gradient norm", record.gradient_norm, result.gradient_norm, tolerance.gradient_norm, 0.0),
    ]
    if was.generator_loss is None and was.critic_loss is None:
        pairs.append(("loss", was.loss, now.loss, tolerance.generator_loss, 0.0))
    for name, recorded, computed, relative, absolute in pairs:
        if recorded is None and computed is None:
            continue
        if name == "gradient norm" and recorded is not None:
            absolute = flip * abs(recorded)
        # Not `>`: a difference that is not a number is no difference within a tolerance.
        if recorded is None or computed is None or not (
            abs(recorded - computed) <= relative * max(abs(recorded), abs(computed), _SMALL) + absolute
        ):  # fmt: skip
            return (
                f"{name} {computed!r}, acknowledged was {recorded!r}, outside the tolerance of {relative:g}"
            )
    return None
