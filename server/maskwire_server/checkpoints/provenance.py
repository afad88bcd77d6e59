"""The decision whether a checkpoint belongs to this run's history or was copied in from elsewhere.

A folder in `checkpoints/` can come from another run, or from a copy of this run that diverged. If the server
counted it among the two checkpoints that a restart falls back on, it would drop batches that the restart
needs. The digest reveals copies that were trained on other batches. Copies that were trained on the same
batches with other optimizer settings have the same digest and differ only in their weights. Therefore, the
journal records an id for each save before the checkpoint is written, and the manifest contains that id.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.journal import Journal
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition

log = logging.getLogger(__name__)

SAVE = "save"
"""The kind of event that records a save."""


def record_save(journal: Journal, position: HistoryPosition, save_id: str) -> None:
    """Record in the journal, within a transaction, that a checkpoint of a durable step will be written."""
    journal.add_event(SAVE, {"id": save_id, "lineage": position.lineage, "step": position.step})


def new_save_id() -> str:
    """Return a new random id for a save."""
    return uuid.uuid4().hex


def recorded_saves(journal: Journal) -> set[str]:
    """The ids of all saves that the journal recorded."""
    return {body["id"] for _, body in journal.events(SAVE)}


def foreign_save(manifest: Manifest, saves: set[str]) -> str | None:
    """Why a checkpoint comes from another copy of the run; None if there is no evidence that it does."""
    if manifest.save_id is None or manifest.save_id in saves:
        return None
    return "it was saved by another copy of the run, whose weights may differ"


class Provenance:
    """The run's id, and the digest of its history at each step that has a checkpoint.

    Only the thread that uses the journal adds entries; any thread may read them. A checkpoint whose step was
    not looked up in the journal does not count as part of the history.
    """

    def __init__(self) -> None:
        self.run_id = ""
        """Empty until the first `look_up`."""
        self._digests: dict[tuple[int, int], bytes] = {}
        self._saves: set[str] = set()
        self._absent: set[tuple[int, int]] = set()  # steps that the journal did not have

    def look_up(self, journal: Journal, manifests: Iterable[Manifest]) -> None:
        """Look up the steps of checkpoints in the journal, except steps that were found before."""
        if not self.run_id:
            self._saves |= recorded_saves(journal)
            self.run_id = journal.fact("run_id")
        for manifest in manifests:
            info = manifest.info
            if manifest.run_id != self.run_id or (info.lineage, info.step) in self._digests:
                continue
            self._absent.add((info.lineage, info.step))
            try:
                digest = journal.digest_at(info.lineage, info.step)
            except RunDirectoryError as error:  # a damaged record proves nothing
                log.error("checkpoint %s is not used, because its step cannot be read: %s", info.name, error)
                continue
            if digest is not None:
                self._digests[info.lineage, info.step] = digest

    def expect(self, position: HistoryPosition, save_id: str) -> None:
        """Register a checkpoint that is about to be written: its durable position and recorded save id."""
        self._digests[position.lineage, position.step] = position.digest
        self._saves.add(save_id)

    def unknown(self, manifest: Manifest) -> bool:
        """Whether the checkpoint's step must still be looked up in the journal."""
        place = manifest.info.lineage, manifest.info.step
        return manifest.run_id == self.run_id and place not in self._digests and place not in self._absent

    def problem(self, manifest: Manifest) -> str | None:
        """Why a checkpoint does not belong to the run's history; None if it does."""
        info = manifest.info
        if manifest.run_id != self.run_id:
            return f"it belongs to run {manifest.run_id}, but this is run {self.run_id}"
        digest = self._digests.get((info.lineage, info.step))
        if digest is None:
            return f"the journal does not have its step {info.step} (lineage {info.lineage})"
        if digest != info.digest:
            return (
                f"it comes from another copy of the run: its history up to step {info.step} (lineage "
                f"{info.lineage}) differs from that of this run"
            )
        return foreign_save(manifest, self._saves)
