"""A position in a run's history."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HistoryPosition:
    """A step of one lineage of a run, and the digest of the history up to it."""

    run_id: str
    lineage: int
    step: int
    digest: bytes
