"""The run's recorded steps: what is asked for, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.results import Losses, Outcome


@dataclass(frozen=True)
class StepsRequest:
    """A client asks for some recorded steps of one lineage."""

    size: int
    """At most so many."""
    first_step: int = 1
    last_step: int | None = None
    """None: the lineage's last."""
    lineage: int | None = None
    """None: the newest."""
    run_id: str = ""
    """Refuse unless this is the run; empty: whichever it is."""


@dataclass(frozen=True)
class RecordedStep:
    """One consumed step."""

    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes


@dataclass(frozen=True)
class StepsPage:
    """Some recorded steps of one lineage, in order, and where the lineage began."""

    run_id: str
    lineage: int
    parent: int | None
    start_step: int
    checkpoint: str | None
    steps: tuple[RecordedStep, ...]
    next_step: int | None
    """The first step of the next page; None: this is the last page."""
