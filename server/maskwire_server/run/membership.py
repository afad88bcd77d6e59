"""Which checkpoints are of this run's history, and which were copied in from elsewhere.

A folder in `checkpoints/` can come from another run, or from another copy of this run that went its own way.
Nothing may count on it: were it taken for one of the two that a start falls back on, the batches that
the start really needs would be dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from maskwire_server.errors import RunDirectoryError
from maskwire_server.manifest import Manifest
from maskwire_server.run.journal import Journal
from maskwire_server.run.replaying import digest_at
from maskwire_server.run.standing import Place

log = logging.getLogger(__name__)


class Membership:
    """The run's id, and the digest that its history has at each step with a checkpoint.

    The journal's thread adds to it, any thread reads it. A checkpoint whose step was not looked up is not
    a member: whatever appears meanwhile counts for nothing until the journal was asked.
    """

    def __init__(self) -> None:
        self.run_id = ""
        """Empty until the journal was read."""
        self._digests: dict[tuple[int, int], bytes] = {}
        self._absent: set[tuple[int, int]] = set()  # steps that the journal did not have when it was asked

    def look_up(self, journal: Journal, manifests: Iterable[Manifest]) -> None:
        """Ask the journal for the steps of checkpoints that are not known yet, absent ones again."""
        self.run_id = journal.fact("run_id")
        for manifest in manifests:
            info = manifest.info
            if manifest.run_id != self.run_id or (info.lineage, info.step) in self._digests:
                continue
            self._absent.add((info.lineage, info.step))
            try:
                digest = digest_at(journal, info.lineage, info.step)
            except RunDirectoryError as error:  # a damaged record proves nothing
                log.error("checkpoint %s does not count: %s", info.name, error)
                continue
            if digest is not None:
                self._digests[info.lineage, info.step] = digest

    def expect(self, place: Place) -> None:
        """A checkpoint of this durable step is about to be written."""
        self._digests[place.lineage, place.step] = place.digest

    def unknown(self, manifest: Manifest) -> bool:
        """Whether the journal was not asked yet."""
        place = manifest.info.lineage, manifest.info.step
        return manifest.run_id == self.run_id and place not in self._digests and place not in self._absent

    def problem(self, manifest: Manifest) -> str | None:
        """Why a checkpoint is not of this run's history; None when it is."""
        info = manifest.info
        if manifest.run_id != self.run_id:
            return f"it belongs to run {manifest.run_id}, this is run {self.run_id}"
        digest = self._digests.get((info.lineage, info.step))
        if digest is None:
            return f"the journal does not have its step {info.step} (lineage {info.lineage})"
        if digest != info.digest:
            return (
                f"it comes from another copy of the run: its history up to step {info.step} (lineage "
                f"{info.lineage}) is not this one"
            )
        return None
