"""Finds the checkpoint for recovery: the newest intact checkpoint of the run's own history."""

from __future__ import annotations

from maskwire_server.checkpoints.provenance import foreign_save, recorded_saves
from maskwire_server.checkpoints.retention import on_path
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.ancestry import Segment
from maskwire_server.journal.journal import Journal
from maskwire_server.manifest import Manifest


def newest_verified(
    checkpoints: Checkpoints, journal: Journal, segments: list[Segment], *, accept_lost: bool = False
) -> tuple[Manifest | None, dict[str, str]]:
    """The newest intact checkpoint of the ancestry, and the problems of other checkpoints, by name.

    Raises RunDirectoryError if a checkpoint holds a step that the journal lost, unless `accept_lost`.
    """
    run_id = journal.fact("run_id")
    lineages, saves = journal.lineages(), recorded_saves(journal)
    wrong = checkpoints.unreadable()
    found = checkpoints.all()
    for manifest in found:
        info = manifest.info
        if manifest.run_id != run_id:
            wrong[info.name] = f"it belongs to run {manifest.run_id}"
            continue
        recorded = journal.digest_at(info.lineage, info.step) if info.lineage in lineages else None
        if recorded == info.digest:
            foreign = foreign_save(manifest, saves)
            if foreign is not None:
                wrong[info.name] = foreign
            continue
        if recorded is not None:  # the journal lost nothing: it has this step with another digest
            wrong[info.name] = (
                f"it comes from another copy of the run: its history up to step {info.step} (lineage "
                f"{info.lineage}) is not this one"
            )
            continue
        lost = f"it holds step {info.step} (lineage {info.lineage}), which the journal does not have"
        if not accept_lost:
            raise RunDirectoryError(
                f"checkpoint {info.name!r}: {lost}. If it was copied here from another copy of the run, move "
                "it out of checkpoints/. Otherwise the journal lost acknowledged steps: restore the run "
                "directory from a copy, or give these steps up permanently with --accept-lost-history"
            )
        wrong[info.name] = lost
    for manifest in on_path(found, segments):
        if manifest.info.name in wrong:
            continue
        problem = checkpoints.damage(manifest)
        if problem is None:
            return manifest, wrong
        wrong[manifest.info.name] = problem
    return None, wrong
