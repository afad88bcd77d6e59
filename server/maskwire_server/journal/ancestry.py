"""The ancestry of the current state: which steps of which lineages led to it."""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.records import Lineage


@dataclass(frozen=True)
class Segment:
    """The part of a lineage that the current state descends from."""

    lineage: int
    through: int | None
    """The last step of that part; None if it has all steps of the lineage."""


def lineage_of(segments: list[Segment], step: int) -> int:
    """The lineage to which a step of the ancestry `segments` belongs."""
    return next(part.lineage for part in segments if part.through is None or step <= part.through)


def includes(segments: list[Segment], lineage: int, step: int) -> bool:
    """Whether a step of a lineage is part of the ancestry `segments`."""
    return any(
        part.lineage == lineage and (part.through is None or step <= part.through) for part in segments
    )


def ancestry(lineages: dict[int, Lineage], lineage: int) -> list[Segment]:
    """The ancestry of `lineage`: its segments, oldest first. Raises RunDirectoryError if it is damaged."""
    segments = [Segment(lineage, None)]
    current = lineages[lineage]
    while current.parent is not None:
        if current.parent >= current.lineage or current.parent not in lineages:
            raise RunDirectoryError(
                f"journal: lineage {current.lineage} must descend from an earlier lineage, got "
                f"{current.parent}: the file was damaged; restore the run directory from a copy"
            )
        segments.append(Segment(current.parent, current.step))
        current = lineages[current.parent]
    return segments[::-1]
