"""The checkpoints in a run's mirror: upload them, download them for a restored run, and delete them.

    checkpoints/NAME.HASH/  *.safetensors  *.json  manifest.json

The manifest is written last. A folder without one is not a checkpoint. HASH is the start of the manifest's
SHA-256, so that two servers never write the same object.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from maskwire_server import failpoints
from maskwire_server.checkpoints import retention
from maskwire_server.checkpoints.catalogue import newest_first
from maskwire_server.checkpoints.files import NOT_A_MANIFEST, describe, flush, write_manifest_bytes
from maskwire_server.checkpoints.provenance import foreign_save, recorded_saves
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import Refused, is_shortage
from maskwire_server.journal.ancestry import Segment, ancestry
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segments import BATCHES, steps_of_batches
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.records import Lineage
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.results import CheckpointInfo, FileInfo

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_UPLOADED = "it is being copied to the mirror"
_OF_A_CHECKPOINT = re.compile(rf"{FOLDER}/.+\.[0-9a-f]{{16}}")


class MirroredCheckpoints:
    """The complete checkpoints of the run's own history in its mirror. Safe to use from any thread."""

    def __init__(self, store: ObjectStore, checkpoints: Checkpoints) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._there: dict[str, Manifest] = {}  # by the name of the folder in the mirror
        self._partial: frozenset[str] = frozenset()  # folders without a manifest, when `read_all` last looked
        self._uploading = threading.Lock()
        self._changing = threading.Lock()  # held while `_there` is replaced

    def read_all(self) -> dict[str, tuple[Manifest, bytes]]:
        """Return the manifest of every complete checkpoint in the mirror, decoded and as bytes, by folder.

        Must be called before this server uploads a checkpoint, because incomplete uploads that it finds are
        taken for those of another server.
        """
        there = self._store.names(FOLDER)
        names = [name for name in there if name.endswith(f"/{MANIFEST}")]
        folders = {"/".join(name.split("/")[:2]) for name in there}
        with_manifest = {name.removesuffix(f"/{MANIFEST}") for name in names}
        self._partial = frozenset(filter(_OF_A_CHECKPOINT.fullmatch, folders - with_manifest))
        found = {}
        for name, data in zip(names, self._store.get_all(names), strict=True):
            if data is None:  # it has been deleted since
                continue
            folder = name.removesuffix(f"/{MANIFEST}")
            try:
                manifest = Manifest.from_json(data)
            except NOT_A_MANIFEST as error:
                log.warning("%s/%s cannot be read and is not used: %s", self._store.address, name, error)
                continue
            absent = {f"{folder}/{file.name}" for file in manifest.info.files}.difference(there)
            if absent:
                log.error(
                    "%s/%s is missing: the checkpoint is not used, and is uploaded again if it is in the run "
                    "directory",
                    self._store.address,
                    min(absent),
                )
                continue
            found[folder] = manifest, data
        return found

    def load(self, found: dict[str, Manifest]) -> None:
        """Set which checkpoints of the run's own history the mirror has: manifests by folder."""
        self._there = dict(found)

    def holds(self, info: CheckpointInfo) -> bool:
        """Whether the mirror has this checkpoint."""
        return any(manifest.info == info for manifest in self._there.values())

    @property
    def newest(self) -> Manifest | None:
        """The newest checkpoint in the mirror; None if it has none."""
        return next(iter(newest_first(self._there.values())), None)

    def newest_of(self, segments: list[Segment]) -> Manifest | None:
        """The newest checkpoint in the mirror that is on the ancestry `segments`; None if there is none."""
        return next(iter(newest_first(retention.on_path(self._there.values(), segments))), None)

    def missing(self) -> list[Manifest]:
        """The run's own checkpoints in the run directory that the mirror lacks, newest first."""
        there = {manifest.to_json() for manifest in self._there.values()}
        return [manifest for manifest in self._checkpoints.own() if manifest.to_json() not in there]

    def upload(self, manifest: Manifest) -> None:
        """Upload a checkpoint that the mirror lacks. Raises StoreError; Refused if it is gone or damaged."""
        with self._uploading:
            if any(each.to_json() == manifest.to_json() for each in self._there.values()):
                return
            name = manifest.info.name
            self._checkpoints.pin(name, _UPLOADED)
            try:
                self._upload(manifest)
            finally:
                self._checkpoints.unpin(name, _UPLOADED)

    def upload_newest(self, lineages: dict[int, Lineage]) -> None:
        """Upload the newest intact checkpoint of the ancestry if the mirror lacks it. Raises StoreError."""
        path = retention.on_path(self._checkpoints.own(), ancestry(lineages, max(lineages)))
        for manifest in path:
            try:
                self.upload(manifest)
                return
            except Refused as refusal:  # it is damaged: try the next one
                log.warning("checkpoint %s is not uploaded: %s", manifest.info.name, refusal)

    def _upload(self, manifest: Manifest) -> None:
        path = self._checkpoints.path(manifest.info.name)
        data = (path / MANIFEST).read_bytes()
        folder = f"{FOLDER}/{manifest.info.name}.{hashlib.sha256(data).hexdigest()[:16]}"
        for file in manifest.info.files:
            if self._copy_twin(file, folder):
                continue
            if not _is_intact(path / file.name, file):
                raise Refused(
                    "CHECKPOINT_DAMAGED",
                    f"its file {file.name} is missing or does not match the manifest; save a new checkpoint, "
                    "then delete this one if it is still listed",
                    name=manifest.info.name,
                )
            self._store.put_file(f"{folder}/{file.name}", path / file.name)
        failpoints.passing("mirror.files_uploaded")
        self._store.put(f"{folder}/{MANIFEST}", data)
        with self._changing:
            self._there = {**self._there, folder: manifest}
            self._partial -= {folder}
        log.info("checkpoint %s uploaded: %.1f MB", manifest.info.name, manifest.info.size_bytes / 1e6)
        failpoints.passing("mirror.checkpoint_uploaded")

    def _copy_twin(self, file: FileInfo, folder: str) -> bool:
        """Copy a file from another checkpoint in the mirror that has it; return False if there is none.

        For example, all checkpoints share weights that are never trained. The copy is not verified, because
        that would require a download. A restore verifies it.
        """
        for twin in [each for each, manifest in self._there.items() if file in manifest.info.files]:
            # Check that the object exists, because a copy that fails is retried even if the object is gone.
            if f"{twin}/{file.name}" in self._store.names(twin):
                self._store.copy(f"{twin}/{file.name}", f"{folder}/{file.name}")
                return True
            log.error(
                "%s/%s/%s is missing: the checkpoint is not used, and is uploaded again if it is in the run "
                "directory",
                self._store.address,
                twin,
                file.name,
            )
            self._forget(twin)  # `missing` then returns it if it is in the run directory
        return False

    def _forget(self, folder: str) -> None:
        with self._changing:
            self._partial -= {folder}
            self._there = {each: manifest for each, manifest in self._there.items() if each != folder}

    # Deleting.

    def collectable(self, lineages: dict[int, Lineage], lineage: int, *, batches: bool) -> list[str]:
        """Return the checkpoint folders, and with `batches` the batch objects, to delete from the mirror.

        Checkpoints in the run directory are kept, and so is everything that a restore may need. Unfinished
        uploads of earlier servers are deleted, although such a server may still be uploading if it has not
        noticed that it is fenced. This is safe: a segment announces each deletion first, and a server that
        restores the run reads that segment. If this server is fenced too, it cannot write the segment, and
        deletes nothing.
        """
        there = newest_first(self._there.values())
        needed = retention.needed(there, lineages, lineage).keys()
        here = {manifest.to_json() for manifest in self._checkpoints.own()}
        gone = [
            folder
            for folder, manifest in self._there.items()
            if manifest.to_json() not in here and manifest.info.name not in needed
        ]
        again = {manifest.info.name for manifest in self._checkpoints.own()}  # uploaded again from here
        gone += sorted(folder for folder in self._partial if _name(folder) not in again)
        if batches:
            stretches = retention.droppable(there, lineages, lineage)
            for name in self._store.names(BATCHES) if stretches else []:
                found = steps_of_batches(name)
                if found is not None and any(
                    part.lineage == found[0] and part.after < found[1] and found[2] <= part.through
                    for part in stretches
                ):
                    gone.append(name)
        return gone

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects whose deletion a segment has announced. A checkpoint's manifest is deleted first."""
        for name in names:
            failpoints.passing("mirror.deleting")
            if name.startswith(f"{FOLDER}/"):
                if name in self._partial:
                    log.info("%s is deleted: a server was lost while it uploaded this checkpoint", name)
                self._forget(name)
                self._store.delete(f"{name}/{MANIFEST}")
                for file in self._store.names(name):
                    self._store.delete(file)
            else:
                self._store.delete(name)

    # Restoring.

    def fetch(self, journal: Journal, gone: tuple[str, ...]) -> None:
        """Download the checkpoints of the run's history that the run directory lacks, newest first.

        Folders in `gone` are skipped, because their deletion was announced.
        """
        found = {folder: each for folder, each in self.read_all().items() if folder not in gone}
        own = members(journal, {folder: manifest for folder, (manifest, _) in found.items()})
        make_folder(self._checkpoints.folder)
        for manifest in newest_first(own.values()):
            folder = next(each for each, m in own.items() if m is manifest)
            path = self._checkpoints.path(manifest.info.name)
            if not (path / MANIFEST).exists():
                failpoints.passing("mirror.fetching")
                self._fetch(folder, manifest, found[folder][1], path)
        failpoints.passing("mirror.fetched")

    def _fetch(self, folder: str, manifest: Manifest, data: bytes, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)  # left by an interrupted fetch
        path.mkdir()
        for file in manifest.info.files:
            there = self._store.get_file(f"{folder}/{file.name}", path / file.name)
            if not there or flush(path / file.name) != file:
                log.error(
                    "%s/%s/%s is missing or does not match its manifest; the run is restored without this "
                    "checkpoint",
                    self._store.address,
                    folder,
                    file.name,
                )
                shutil.rmtree(path)
                return
        write_manifest_bytes(path, data)
        flush_folder(self._checkpoints.folder)
        log.info("checkpoint %s fetched", manifest.info.name)


def _is_intact(path: Path, file: FileInfo) -> bool:
    """Whether a file has the size and SHA-256 that its manifest lists."""
    try:
        return describe(path) == file
    except OSError as error:
        if is_shortage(error):  # it may be intact
            raise
        return False


def _name(folder: str) -> str:
    """The name of the checkpoint that a folder of the mirror holds."""
    return folder.removeprefix(f"{FOLDER}/").rpartition(".")[0]


def members(journal: Journal, found: dict[str, Manifest]) -> dict[str, Manifest]:
    """Select the checkpoints that belong to the run's history. A fenced server may have uploaded others."""
    saves, run_id, lineages = recorded_saves(journal), journal.fact("run_id"), journal.lineages()
    own = {}
    for folder, manifest in found.items():
        info = manifest.info
        if manifest.run_id != run_id or info.lineage not in lineages or foreign_save(manifest, saves):
            continue
        if journal.digest_at(info.lineage, info.step) == info.digest:
            own[folder] = manifest
    return own
