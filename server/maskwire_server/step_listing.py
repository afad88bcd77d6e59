"""Requests for recorded steps, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from maskwire.v1.values import Losses, Outcome


@dataclass(frozen=True)
class StepsRequest:
    """A request for recorded steps of one lineage."""

    size: int
    """The largest number of steps to return."""
    first_step: int = 1
    last_step: int | None = None
    """None: up to the lineage's last step."""
    lineage: int | None = None
    """None: the newest lineage."""
    run_id: str = ""
    """The run that is expected; empty: any."""


@dataclass(frozen=True)
class RecordedStep:
    """A step, as the journal records it."""

    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes


@dataclass(frozen=True)
class StepsPage:
    """Recorded steps of one lineage, in order, and where the lineage started."""

    run_id: str
    lineage: int
    parent: int | None
    start_step: int
    checkpoint: str | None
    steps: tuple[RecordedStep, ...]
    next_step: int | None
    """The first step of the next page; None on the last page."""
    seconds: float = 0.0
    """How long the committer took to read the page."""
