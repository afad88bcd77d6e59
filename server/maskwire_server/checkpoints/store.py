"""The checkpoints of one run directory: write, read, verify and delete them, and protect them while in use.

    checkpoints/NAME/  *.safetensors  *.json  manifest.json
                       parts-*/  while several ranks write

Each file is written, flushed, read back and hashed. The manifest is written last, with the size and SHA-256
of each file and a hash of itself. A folder without an intact manifest is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from maskwire.v1.values import unsharded_name
from maskwire_server import failpoints
from maskwire_server.checkpoints.catalogue import Catalogue, newest_first
from maskwire_server.checkpoints.files import (
    NOT_A_MANIFEST,
    Snapshot,
    describe,
    described,
    is_unfinished,
    read_manifest,
    remove_unfinished,
    write_manifest,
)
from maskwire_server.errors import Refused, RunDirectoryError, is_shortage
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.manifest import MANIFEST, SHARDED, WHOLE, Manifest, UnknownFormatError
from maskwire_server.requests import CHECKPOINT_NAME
from maskwire_server.results import FROZEN_FILE, FileInfo

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_DOWNLOADED, _LATELY = "it is being downloaded", "it was downloaded in the last minute"
_ASIDE = ".aside"  # no checkpoint's name contains a dot


class Checkpoints:
    """The checkpoints of one run directory. Several threads may use it, but only one may call `write`.

    With the `catalogue` of a run, only checkpoints of that run's own history can be used.
    """

    def __init__(
        self,
        run_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        catalogue: Catalogue | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._catalogue = catalogue
        self._clock = clock
        self._read_until: dict[str, float] = {}  # a client may request another file soon
        self._verified: set[str] = set()
        self._pins: list[tuple[str, str]] = []  # name and reason
        self._changing: set[str] = set()  # being written or deleted
        self._lock = threading.RLock()  # held while a name is looked up, leased, added or removed

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.folder / name

    def write(self, snapshot: Snapshot, manifest: Manifest) -> Manifest:
        """Write a checkpoint durably, read it back, and return its manifest with the list of files.

        Raises Refused with CHECKPOINT_EXISTS if the name is taken, and with CHECKPOINT_FAILED if the
        checkpoint cannot be written. Nothing of it remains in that case.
        """
        name = manifest.info.name
        folder = self.path(name)
        if read_manifest(folder) is not None:
            raise Refused("CHECKPOINT_EXISTS", f"checkpoint {name!r} exists; choose another name", name=name)
        if self.foreign(name):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"checkpoints/{name} exists but is not a checkpoint; choose another name",
                name=name,
            )
        begun = False
        self._changing.add(name)
        try:
            if (folder / MANIFEST).exists():  # damaged, or its folder was renamed: kept for the operator
                self.set_aside(name)
            elif folder.exists():  # left by a save that was interrupted
                remove_unfinished(folder)
            make_folder(self.folder)
            folder.mkdir()
            begun = True
            failpoints.passing("checkpoint.begun")
            linked = self._link_frozen(folder)
            shards = snapshot.write(folder)
            failpoints.passing("checkpoint.written")
            of_ranks = {file.name: file for file in shards or ()}
            files = tuple(described(path, linked, of_ranks) for path in sorted(folder.iterdir()))
            failpoints.passing("checkpoint.flushed")
            info = replace(manifest.info, files=files)
            whole = replace(manifest, info=info, format=WHOLE if shards is None else SHARDED)
            write_manifest(folder, whole)
            flush_folder(self.folder)
            self._verified.add(name)
            if self._catalogue is not None:
                self._catalogue.put(whole)
            failpoints.passing("checkpoint.published")
        except OSError as error:
            if begun:
                shutil.rmtree(folder, ignore_errors=True)
            if self._catalogue is not None:
                self._catalogue.remove(name)
            if is_shortage(error):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "free some space" if full else "check the server's disk"
            raise Refused(
                "CHECKPOINT_FAILED",
                f"checkpoint {name!r} could not be written ({error.strerror}); {cure}, and save again",
                name=name,
                error=error.strerror,
            ) from error
        finally:
            self._changing.discard(name)
        return whole

    def _link_frozen(self, folder: Path) -> dict[str, FileInfo]:
        """Hard-link the files of weights that are never trained, to store them once. Return these files."""
        for manifest in self.own():
            files = {f.name: f for f in manifest.info.files if unsharded_name(f.name) == FROZEN_FILE}
            if files and self.verified(manifest):
                try:
                    for name in files:
                        (folder / name).hardlink_to(self.path(manifest.info.name) / name)
                except OSError:  # a file system without hard links: they are written again
                    return {}
                return files
        return {}

    def foreign(self, name: str) -> bool:
        """Whether checkpoints/ has a file or folder of this name that was not written by a save."""
        folder = self.path(name)
        return folder.exists() and not (folder / MANIFEST).exists() and not is_unfinished(folder)

    def taken(self, name: str) -> bool:
        """Whether this name is taken, so that a save cannot use it."""
        return read_manifest(self.path(name)) is not None or self.foreign(name)

    def all(self) -> list[Manifest]:
        """Read the manifests of all complete checkpoints in the folder, even of other runs, newest first."""
        folders = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return newest_first(manifest for manifest in map(read_manifest, folders) if manifest is not None)

    def own(self) -> list[Manifest]:
        """The checkpoints of the run's own history, newest first, from the catalogue.

        Without a catalogue, these are all complete checkpoints in the folder, even those of other runs.
        """
        return self.all() if self._catalogue is None else self._catalogue.own()

    def named(self, name: str) -> list[Manifest]:
        """Read a checkpoint's manifest and update the catalogue. Return [manifest], or [] if it has none."""
        if not CHECKPOINT_NAME.fullmatch(name):
            return []
        with self._lock:
            manifest = None if name in self._changing else read_manifest(self.path(name))
            if self._catalogue is not None and name not in self._changing:
                if manifest is None:
                    self._catalogue.remove(name)
                else:
                    self._catalogue.put(manifest)
        return [] if manifest is None else [manifest]

    def compare(self) -> list[Manifest]:
        """Update the catalogue from the names in the folder, and return the checkpoints that it lacked.

        An operator may copy checkpoints in, or remove them, while the server runs.
        """
        known = set() if self._catalogue is None else self._catalogue.names()
        there = {folder.name for folder in self.folder.iterdir()} if self.folder.is_dir() else set()
        for name in known - there:
            self.named(name)
        return [manifest for name in sorted(there - known) for manifest in self.named(name)]

    def unreadable(self) -> dict[str, str]:
        """Return which manifests cannot be read, and why. Raises RunDirectoryError for a newer format."""
        problems = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if not CHECKPOINT_NAME.fullmatch(folder.name):
                continue  # `set_aside` renamed it
            try:
                name = Manifest.from_json((folder / MANIFEST).read_bytes()).info.name
                if name != folder.name:
                    problems[folder.name] = f"{MANIFEST} is that of checkpoint {name!r}"
            except UnknownFormatError as error:
                raise RunDirectoryError(f"checkpoint {folder.name!r}: {error}") from error
            except (FileNotFoundError, NotADirectoryError):
                continue
            except NOT_A_MANIFEST as error:
                if is_shortage(error):
                    raise
                problems[folder.name] = f"{MANIFEST} cannot be read: {error}"
        return problems

    def get(self, name: str) -> Manifest:
        """Return a complete checkpoint. Raises Refused with CHECKPOINT_NOT_FOUND or CHECKPOINT_DAMAGED."""
        manifest = next(iter(self.named(name)), None)
        if manifest is None:
            names = ", ".join(m.info.name for m in self.own()[:3]) or "none"
            raise Refused(
                "CHECKPOINT_NOT_FOUND",
                f"no checkpoint is named {name!r}; the newest are: {names}",
                name=name,
            )
        problem = None if self._catalogue is None else self._catalogue.problem(manifest)
        if problem is not None:
            raise Refused(
                "CHECKPOINT_DAMAGED",
                f"checkpoint {name!r} cannot be used: {problem}; choose one that `maskwire checkpoint list` "
                "shows, and move this one's folder out of checkpoints/",
                name=name,
                problem=problem,
            )
        return manifest

    def damage(self, manifest: Manifest) -> str | None:
        """Read and hash every file of a checkpoint. Return the damage in words, or None if it is intact.

        If several ranks wrote it, an unlisted file is damage too: it could be read as a part of a tensor.
        """
        folder = self.path(manifest.info.name)
        self._verified.discard(manifest.info.name)
        found_manifest = read_manifest(folder)
        if found_manifest is None or found_manifest.to_json() != manifest.to_json():
            return f"{MANIFEST}: is missing or was changed"
        for file in manifest.info.files:
            try:
                found = describe(folder / file.name, from_disk=True)
            except OSError as error:
                if is_shortage(error):  # the file may be intact
                    raise
                return f"{file.name}: {error.strerror}"
            if found != file:
                return f"{file.name}: does not match the manifest's size and SHA-256"
        if manifest.format == SHARDED:
            known = {MANIFEST, *(file.name for file in manifest.info.files)}
            for path in sorted(folder.iterdir()):
                if path.name not in known:
                    return f"{path.name}: is not listed in {MANIFEST}; move it out of the folder"
        self._verified.add(manifest.info.name)
        return None

    def doubt(self, name: str) -> None:
        """Forget that a checkpoint was found intact, because something is wrong with its files."""
        self._verified.discard(name)

    def verified(self, manifest: Manifest) -> bool:
        """Whether a checkpoint's files are intact. They are read unless this process has verified them."""
        return manifest.info.name in self._verified or self.damage(manifest) is None

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Manifest]:
        """Protect a checkpoint from deletion during a download and for 60 s after. Raises what `get` does."""
        manifest = self.pin(name, _DOWNLOADED)
        try:
            yield manifest
        finally:
            with self._lock:
                self.unpin(name, _DOWNLOADED)
                self._read_until[name] = self._clock() + LEASE_SECONDS

    def pin(self, name: str, reason: str) -> Manifest:
        """Protect a checkpoint from deletion until `unpin` is called. Raises what `get` does."""
        with self._lock:
            manifest = self.get(name)
            self._pins.append((name, reason))
        return manifest

    def unpin(self, name: str, reason: str) -> None:
        """End the protection that `pin` gave a checkpoint for `reason`."""
        with self._lock:
            self._pins.remove((name, reason))

    def delete(self, name: str) -> str:
        """Delete a checkpoint, its manifest first, so that a partly deleted one never counts as complete.

        Returns "" or, if the checkpoint is in use or was downloaded in the last minute, why it was kept.
        """
        folder = self.path(name)
        with self._lock:
            if in_use := self._in_use(name):
                return in_use
            if not folder.exists():
                self.named(name)
                return ""
            self._changing.add(name)
            if self._catalogue is not None:
                self._catalogue.remove(name)
        try:  # without the lock: deleting large files takes long
            self._verified.discard(name)
            failpoints.passing("checkpoint.collecting")
            (folder / MANIFEST).unlink(missing_ok=True)
            failpoints.passing("checkpoint.undone")
            flush_folder(folder)
            shutil.rmtree(folder)
            failpoints.passing("checkpoint.collected")
        finally:
            self._changing.discard(name)
            self.named(name)  # it may still be complete
        return ""

    def _in_use(self, name: str) -> str:
        """The reason why a checkpoint is in use and cannot be deleted now; "" if it is not in use."""
        lately = _LATELY if self._clock() < self._read_until.get(name, 0.0) else ""
        return next((reason for pinned, reason in self._pins if pinned == name), lately)

    def set_aside(self, name: str) -> str:
        """Rename a checkpoint, so that nothing relies on it, and return its new name."""
        aside = f"{name}{_ASIDE}"
        while (self.folder / aside).exists():
            aside += "_"
        with self._lock:
            try:
                self.path(name).rename(self.folder / aside)
            finally:
                self.named(name)
        flush_folder(self.folder)
        return aside

    def sweep(self) -> list[str]:
        """Delete the folders of saves that were interrupted, and return their names."""
        swept = []
        for name in self.unfinished():
            try:
                remove_unfinished(self.folder / name)
                swept.append(name)
            except OSError as error:
                log.warning("the unfinished checkpoint %s could not be removed: %s", name, error)
        return swept

    def unfinished(self) -> list[str]:
        """The names of the folders that a save started to write and did not finish."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(folder.name for folder in folders if is_unfinished(folder))
