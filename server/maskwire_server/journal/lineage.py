"""Which steps and checkpoints the present state descends from, across the lineages that restores opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.records import Lineage
from maskwire_server.manifest import Manifest


@dataclass(frozen=True)
class Segment:
    """A part of one lineage that the current state descends from."""

    lineage: int
    through: int | None
    """The last step of it that counts; None: all."""


def ancestry(lineages: dict[int, Lineage], lineage: int) -> list[Segment]:
    """The segments from the first lineage to `lineage`, oldest first. Raises RunDirectoryError."""
    segments = [Segment(lineage, None)]
    current = lineages[lineage]
    while current.parent is not None:
        if current.parent >= current.lineage or current.parent not in lineages:
            raise RunDirectoryError(
                f"journal: lineage {current.lineage} descends from lineage {current.parent}, which is not "
                "before it: the file was damaged; restore the run directory from a copy"
            )
        segments.append(Segment(current.parent, current.step))
        current = lineages[current.parent]
    return segments[::-1]


def on_path(manifests: Iterable[Manifest], segments: list[Segment]) -> list[Manifest]:
    """Those of the ancestry, in the order given."""
    through = {segment.lineage: segment.through for segment in segments}

    def counts(lineage: int, step: int) -> bool:
        last = through.get(lineage, -1)
        return last is None or step <= last

    return [manifest for manifest in manifests if counts(manifest.info.lineage, manifest.info.step)]
