"""Retention: which checkpoints may be deleted, and which batches may be dropped from the journal.

Only checkpoints on the ancestry count: the chain of lineages that leads to the current state. Its two newest
checkpoints are kept whatever the settings say. If one of them is damaged, recovery starts from the other and
recomputes the steps after it. The batches of these steps are therefore kept too.
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
"""How many of the newest checkpoints are kept so that a restart can fall back on them."""


def on_path(manifests: Iterable[Manifest], segments: list[Segment]) -> list[Manifest]:
    """Select the checkpoints that belong to the ancestry `segments`, in the order given."""
    return [
        manifest for manifest in manifests if includes(segments, manifest.info.lineage, manifest.info.step)
    ]


def needed(manifests: list[Manifest], lineages: dict[int, Lineage], lineage: int) -> dict[str, str]:
    """Return the names of the checkpoints that must be kept, each with the reason.

    `manifests` are the checkpoints of the run's own history, newest first.
    """
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
    """Return the names of the automatic checkpoints to delete. All other checkpoints are kept."""
    own = [m.info for m in on_path(manifests, ancestry(lineages, lineage)) if m.automatic]
    scored = sorted((info for info in own if info.score is not None), key=lambda info: info.score or 0.0)
    plain = [info for info in own if info.score is None]
    kept = {info.name for info in (*scored[: settings.keep_best], *plain[: settings.keep_last])}
    kept |= needed(manifests, lineages, lineage).keys()
    if settings.keep_every:
        kept |= {info.name for info in plain if info.step % settings.keep_every == 0}
    return [info.name for info in own if info.name not in kept]


def droppable(manifests: list[Manifest], lineages: dict[int, Lineage], lineage: int) -> list[Stretch]:
    """Return the steps whose batches no recovery needs: all except those after the second-newest checkpoint.

    The result is empty if there are fewer than two checkpoints.
    """
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
