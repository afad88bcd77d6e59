"""The catalogue of a run's checkpoints, in memory, so that listing them does not read their folders.

The folders are authoritative. The server reads them when it starts, and then updates the catalogue on every
save, deletion and re-read of a folder. A table of the journal holds a copy, so that the checkpoints of a run
are known even if their folder is lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from maskwire_server.checkpoints.provenance import Provenance
from maskwire_server.journal.journal import Journal
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition

log = logging.getLogger(__name__)


class Catalogue:
    """The complete checkpoints in the folder of a run. Safe to use from any thread."""

    def __init__(self) -> None:
        self._provenance = Provenance()
        self._manifests: dict[str, Manifest] = {}
        self._rebuild = False  # whether the table differs from the folder
        self._unrecorded: dict[str, Manifest | None] = {}  # since the table was written; None: removed
        self._lock = threading.Lock()

    @property
    def run_id(self) -> str:
        """The run's id; empty until `load` is called."""
        return self._provenance.run_id

    def load(self, journal: Journal, manifests: Iterable[Manifest]) -> None:
        """Set the manifests that were found in the folder, and note whether the journal's table differs."""
        found = {manifest.info.name: manifest for manifest in manifests}
        recorded = journal.checkpoints()
        with self._lock:
            self._manifests = found
            if recorded != {name: manifest.to_json() for name, manifest in found.items()}:
                self._rebuild, self._unrecorded = True, {**found}
        for name in sorted(recorded.keys() - found.keys()):
            log.warning("checkpoint %s is no longer in checkpoints/", name)
        self.look_up(journal)

    def look_up(self, journal: Journal) -> None:
        """Look up the steps of all checkpoints in the journal, except steps that were found before."""
        self._provenance.look_up(journal, list(self._manifests.values()))

    def expect(self, position: HistoryPosition, save_id: str) -> None:
        """Register a checkpoint that is about to be written: its durable position and recorded save id."""
        self._provenance.expect(position, save_id)

    def put(self, manifest: Manifest) -> None:
        """Add a complete checkpoint, or replace the one that has its name."""
        name = manifest.info.name
        with self._lock:
            if self._manifests.get(name) != manifest:
                self._manifests = {**self._manifests, name: manifest}
                self._unrecorded[name] = manifest

    def remove(self, name: str) -> None:
        """Remove the checkpoint of this name, because no complete checkpoint has the name any more."""
        with self._lock:
            if name in self._manifests:
                self._manifests = {key: value for key, value in self._manifests.items() if key != name}
                self._unrecorded[name] = None

    def names(self) -> set[str]:
        """The names of all checkpoints in the folder, including those that belong to another run."""
        return set(self._manifests)

    def own(self) -> list[Manifest]:
        """The checkpoints of the run's own history, newest first."""
        own = [manifest for manifest in self._manifests.values() if self.problem(manifest) is None]
        return newest_first(own)

    def unknown(self, manifest: Manifest) -> bool:
        """Whether the journal must be read to decide whether the checkpoint belongs to the run."""
        return self._provenance.unknown(manifest)

    def problem(self, manifest: Manifest) -> str | None:
        """Why a checkpoint does not belong to the run's history; None if it does."""
        return self._provenance.problem(manifest)

    # The journal's table.

    def record(self, journal: Journal) -> dict[str, Manifest | None]:
        """Write the changes to the journal's table within a transaction, and return them for `recorded`."""
        with self._lock:
            rebuild, changes = self._rebuild, dict(self._unrecorded)
        if rebuild:
            journal.remove_checkpoints()
        for name, manifest in changes.items():
            if manifest is None:
                journal.remove_checkpoint(name)
            else:
                journal.put_checkpoint(name, manifest.to_json())
        return changes

    def recorded(self, changes: dict[str, Manifest | None]) -> None:
        """Note that the transaction that wrote these changes is durable."""
        with self._lock:
            self._rebuild = False
            for name, manifest in changes.items():
                if name in self._unrecorded and self._unrecorded[name] is manifest:
                    del self._unrecorded[name]

    @property
    def is_recorded(self) -> bool:
        """Whether the journal's table has the same checkpoints as the catalogue."""
        return not (self._rebuild or self._unrecorded)


def newest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Sort manifests by lineage, step and time of the save, newest first."""
    return sorted(manifests, key=lambda m: (m.info.lineage, m.info.step, m.info.created), reverse=True)
