"""The report of a run's mirror."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MirrorStatus:
    """What of the run is in its mirror."""

    address: str
    acknowledge: str
    """"local" or "mirrored"."""
    lineage: int
    step: int
    """The newest step in the mirror; 0: none."""
    segment: int
    """The newest segment."""
    segment_at: float
    """When it was written, in seconds since the epoch."""
    checkpoint: str
    """The newest checkpoint in the mirror; empty: none."""
    problem: str
    """Why nothing can be uploaded now; empty: all is well."""
    restored: str
    """From which point the run was last restored from the mirror, in words; empty: never."""
    uploaded_bytes: int
    """Records and batches that this process has uploaded."""
    failures: int
    """Uploads that failed and were tried again, or will be."""
