"""Retention: which checkpoints may be deleted, and which batches may be dropped from the journal.

Only the ancestry of the current state counts. Its two newest checkpoints are kept whatever the settings say:
if one is damaged, recovery starts from the other and recomputes the steps after it, whose batches are
therefore kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from maskwire_server.config import CheckpointsConfig
from maskwire_server.journal.ancestry import Segment, ancestry, includes
from maskwire_server.journal.records import Lineage, Stretch
from maskwire_server.manifest import Manifest

INITIAL = "initial"
"""The prefix of the name of the checkpoint at step 0, if the seed does not make the initial weights."""
FALLBACKS = 2
"""How many of the newest checkpoints are kept for a start to fall back on."""


def on_path(manifests: Iterable[Manifest], segments: list[Segment]) -> list[Manifest]:
    """The checkpoints of the ancestry, in the order given."""
    return [
        manifest for manifest in manifests if includes(segments, manifest.info.lineage, manifest.info.step)
    ]


def needed(manifests: list[Manifest], lineages: dict[int, Lineage], lineage: int) -> dict[str, str]:
    """The checkpoints that must be kept, and why. `manifests` are the run's own, newest first."""
    path = on_path(manifests, ancestry(lineages, lineage))
    why = {manifest.info.name: "a start may need it" for manifest in path[:FALLBACKS]}
    for other in lineages.values():
        if other.checkpoint:
            why[other.checkpoint] = f"lineage {other.lineage} started from it"
    for info in (manifest.info for manifest in manifests if not manifest.automatic):
        if info.step == 0 and info.name.startswith(f"{INITIAL}-"):
            why[info.name] = "it holds the weights that the run began from"
    return why


def collectable(
    manifests: list[Manifest], lineages: dict[int, Lineage], lineage: int, settings: CheckpointsConfig
) -> list[str]:
    """The automatic checkpoints of the ancestry to delete; all other checkpoints are kept."""
    own = [m.info for m in on_path(manifests, ancestry(lineages, lineage)) if m.automatic]
    scored = sorted((info for info in own if info.score is not None), key=lambda info: info.score or 0.0)
    plain = [info for info in own if info.score is None]
    kept = {info.name for info in (*scored[: settings.keep_best], *plain[: settings.keep_last])}
    kept |= needed(manifests, lineages, lineage).keys()
    if settings.keep_every:
        kept |= {info.name for info in plain if info.step % settings.keep_every == 0}
    return [info.name for info in own if info.name not in kept]


def droppable(manifests: list[Manifest], lineages: dict[int, Lineage], lineage: int) -> list[Stretch]:
    """The steps whose batches no recovery needs: all but those after the second-newest checkpoint."""
    segments = ancestry(lineages, lineage)
    path = on_path(manifests, segments)
    if len(path) < FALLBACKS:
        return []
    first = path[FALLBACKS - 1].info
    through = {s.lineage: s.through for s in segments if s.lineage >= first.lineage}
    gone = []
    for number in lineages:
        if number not in through:
            gone.append(Stretch(number, -1))
            continue
        if number == first.lineage:
            gone.append(Stretch(number, -1, first.step))
        last = through[number]
        if last is not None:
            gone.append(Stretch(number, last))
    return gone
