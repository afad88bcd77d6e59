"""Inexact replays: steps whose recomputed results differ from the recorded bytes.

They are recorded permanently, and shown to clients and in manifests.
"""

from __future__ import annotations

from collections.abc import Iterable

from maskwire.v1.values import InexactReplay
from maskwire_server.journal.ancestry import Segment, includes
from maskwire_server.journal.journal import Journal

EVENT = "inexact_replay"


def record(journal: Journal, replays: Iterable[InexactReplay], beyond: list[int]) -> None:
    """Record the inexact ranges of one replay. `beyond` lists the steps beyond the tolerance."""
    body = {"steps": beyond, "replays": [vars(replay) for replay in replays]}
    journal.transaction(lambda: journal.add_event(EVENT, body))


def recorded(journal: Journal) -> tuple[InexactReplay, ...]:
    """Every inexact replay of the run, sorted by lineage and step. Overlapping replays are merged."""
    found: list[InexactReplay] = []
    for at, body in journal.events(EVENT):
        if "replays" in body:
            found += [InexactReplay(**replay) for replay in body["replays"]]
        elif body["steps"]:  # written by version 0.1, which recorded only the steps
            steps = body["steps"]
            found.append(InexactReplay(journal.lineage_at(at), min(steps), max(steps), True))
    merged: list[InexactReplay] = []
    for replay in sorted(found, key=lambda r: (r.lineage, r.first_step, r.last_step)):
        last = merged[-1] if merged else None
        if last is None or last.lineage != replay.lineage or replay.first_step > last.last_step:
            merged.append(replay)
            continue
        merged[-1] = InexactReplay(
            last.lineage,
            last.first_step,
            max(last.last_step, replay.last_step),
            last.accepted or replay.accepted,
        )
    return tuple(merged)


def within(replays: Iterable[InexactReplay], segments: list[Segment]) -> tuple[InexactReplay, ...]:
    """The inexact replays that are part of the ancestry `segments`."""
    return tuple(replay for replay in replays if includes(segments, replay.lineage, replay.first_step))


def ahead(
    replays: Iterable[InexactReplay], segments: list[Segment], start: tuple[int, int]
) -> tuple[InexactReplay, ...]:
    """The inexact replays in the ancestry `segments` that end after `start`, a lineage and a step."""
    return tuple(replay for replay in within(replays, segments) if (replay.lineage, replay.last_step) > start)
