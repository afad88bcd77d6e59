"""Checkpoints: a folder of files and a manifest, whole or absent.

    checkpoints/NAME/  *.safetensors  *.json  manifest.json

Each file is written and flushed, then read back and hashed, and the manifest comes last: without a
whole manifest a checkpoint does not exist. The manifest holds each file's size and SHA-256, and a hash
of itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from maskwire_server import failpoints
from maskwire_server.checkpoints.membership import Membership
from maskwire_server.errors import Refused, RunDirectoryError, is_shortage
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.journal.journal import Journal
from maskwire_server.manifest import MANIFEST, Manifest, UnknownFormatError
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import CHECKPOINT_NAME
from maskwire_server.results import CheckpointInfo, FileInfo

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_SAVED = {".safetensors", ".json", ".draft"}
_DRAFT = ".tmp"  # what safetensors writes into, before it renames it
_ASIDE = ".aside"  # a dot is in no checkpoint's name
_NO_MANIFEST = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Snapshot(Protocol):
    """A copy of the trainer's state in host memory."""

    def write(self, folder: Path) -> None:
        """Write its files into `folder`; the caller flushes them."""


class Checkpoints:
    """The checkpoints of one run directory. Safe to call from several threads, one `write` at a time.

    With a `membership`, only checkpoints of the run's own history can be chosen.
    """

    def __init__(
        self,
        run_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        membership: Membership | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._membership = membership
        self._clock = clock
        self._readers: Counter[str] = Counter()
        self._read_until: dict[str, float] = {}  # a reader may come back for the next file
        self._verified: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._going: set[str] = set()  # being deleted
        self._lock = threading.Lock()  # between readers and `delete`

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.folder / name

    def write(self, snapshot: Snapshot, manifest: Manifest) -> Manifest:
        """Write a checkpoint durably, read it back, and return its manifest with the files in it.

        Raises Refused: CHECKPOINT_FAILED when that cannot be done, and nothing of it then remains;
        CHECKPOINT_EXISTS when a whole one has the name.
        """
        folder = self.path(manifest.info.name)
        if _read_manifest(folder) is not None:
            raise Refused(
                "CHECKPOINT_EXISTS", f"the name {folder.name!r} is taken; choose another", name=folder.name
            )
        if self.foreign(folder.name):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"checkpoints/{folder.name} is there and is no checkpoint's; choose another name",
                name=folder.name,
            )
        begun = False
        try:
            if (folder / MANIFEST).exists():  # not whole, and not of this name: somebody may want it yet
                self.set_aside(folder.name)
            elif folder.exists():  # the unfinished folder of a save that was cut off
                shutil.rmtree(folder)
            make_folder(self.folder)
            folder.mkdir()
            begun = True
            failpoints.passing("checkpoint.begun")
            snapshot.write(folder)
            failpoints.passing("checkpoint.written")
            files = tuple(_flush(path) for path in sorted(folder.iterdir()))
            failpoints.passing("checkpoint.flushed")
            info = CheckpointInfo(**{**vars(manifest.info), "files": files})
            whole = Manifest(**{**vars(manifest), "info": info})
            _write_manifest(folder, whole)
            flush_folder(self.folder)
            self._verified.add(manifest.info.name)
            failpoints.passing("checkpoint.published")
        except OSError as error:
            if begun:
                shutil.rmtree(folder, ignore_errors=True)
            if is_shortage(error):
                raise
            cure = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "look at the disk"
            raise Refused(
                "CHECKPOINT_FAILED",
                f"checkpoint {manifest.info.name!r} could not be written ({error.strerror}); {cure}, and "
                "save again",
                name=manifest.info.name,
                error=error.strerror,
            ) from error
        return whole

    def foreign(self, name: str) -> bool:
        """Whether something is in the place of this name that no save has put there."""
        folder = self.path(name)
        return folder.exists() and not (folder / MANIFEST).exists() and not _unfinished(folder)

    def all(self) -> list[Manifest]:
        """All that are whole, wherever from, the newest first. Files are not read: `damage` does that."""
        found = []
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                manifest = _read_manifest(folder)
                if manifest is not None:
                    found.append(manifest)
        return sorted(found, key=lambda m: (m.info.lineage, m.info.step, m.info.created), reverse=True)

    def own(self) -> list[Manifest]:
        """The whole checkpoints of the run's own history, the newest first."""
        return [manifest for manifest in self.all() if self._problem(manifest) is None]

    def recognise(self, journal: Journal) -> None:
        """Ask the journal about checkpoints that came since it was asked last; its thread calls this."""
        if self._membership is not None:
            self._membership.look_up(journal, self.all())

    def expect(self, position: HistoryPosition, save_id: str) -> None:
        """A checkpoint of this durable step is about to be written, and its save is recorded."""
        if self._membership is not None:
            self._membership.expect(position, save_id)

    def _problem(self, manifest: Manifest) -> str | None:
        return None if self._membership is None else self._membership.problem(manifest)

    def unreadable(self) -> dict[str, str]:
        """Checkpoints whose manifest cannot be read, and why; RunDirectoryError for a newer format."""
        problems = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if not CHECKPOINT_NAME.fullmatch(folder.name):
                continue  # set aside before
            try:
                name = Manifest.from_json((folder / MANIFEST).read_bytes()).info.name
                if name != folder.name:
                    problems[folder.name] = f"{MANIFEST} says that it is {name!r}"
            except UnknownFormatError as error:
                raise RunDirectoryError(f"checkpoint {folder.name!r}: {error}") from error
            except (FileNotFoundError, NotADirectoryError):
                continue
            except _NO_MANIFEST as error:
                if is_shortage(error):
                    raise
                problems[folder.name] = f"{MANIFEST} cannot be read: {error}"
        return problems

    def named(self, name: str) -> list[Manifest]:
        """The whole checkpoint of a name, wherever it is from, if there is one."""
        manifest = _read_manifest(self.path(name)) if CHECKPOINT_NAME.fullmatch(name) else None
        return [] if manifest is None else [manifest]

    def get(self, name: str) -> Manifest:
        """A whole checkpoint of the run by name; Refused CHECKPOINT_NOT_FOUND, CHECKPOINT_DAMAGED."""
        manifest = None if name in self._going else next(iter(self.named(name)), None)
        if manifest is None:
            names = ", ".join(m.info.name for m in self.own()[:3]) or "none"
            raise Refused(
                "CHECKPOINT_NOT_FOUND",
                f"no checkpoint is named {name!r}; the newest are: {names}",
                name=name,
            )
        problem = self._problem(manifest)
        if problem is not None:
            raise Refused(
                "CHECKPOINT_DAMAGED",
                f"checkpoint {name!r} cannot be used: {problem}; choose one that `checkpoint list` shows, "
                "and move this folder out of checkpoints/",
                name=name,
                problem=problem,
            )
        return manifest

    def damage(self, manifest: Manifest) -> str | None:
        """What is wrong with a checkpoint's files, read and hashed anew; None when nothing is."""
        folder = self.path(manifest.info.name)
        self._verified.discard(manifest.info.name)
        for file in manifest.info.files:
            try:
                found = describe(folder / file.name)
            except OSError as error:
                if is_shortage(error):  # it says nothing of the file
                    raise
                return f"{file.name}: {error.strerror}"
            if found != file:
                return f"{file.name}: does not match the manifest's size and SHA-256"
        self._verified.add(manifest.info.name)
        return None

    def doubt(self, name: str) -> None:
        """Something was wrong with its files: they are read again before anything counts on them."""
        self._verified.discard(name)

    def intact(self, manifest: Manifest) -> bool:
        """Whether its files were found intact in this process; nothing is read."""
        return manifest.info.name in self._verified

    def verified(self, manifest: Manifest) -> bool:
        """Whether its files were found intact, now or earlier in this process."""
        return manifest.info.name in self._verified or self.damage(manifest) is None

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Manifest]:
        """A whole checkpoint, kept while somebody reads it; Refused CHECKPOINT_NOT_FOUND."""
        with self._lock:
            manifest = self.get(name)
            self._readers[name] += 1
        try:
            yield manifest
        finally:
            with self._lock:
                self._readers[name] -= 1
                self._read_until[name] = self._clock() + LEASE_SECONDS

    def pin(self, name: str) -> Manifest:
        """A whole checkpoint that a restore goes back to, kept from now on; Refused CHECKPOINT_NOT_FOUND."""
        with self._lock:
            manifest = self.get(name)
            self._pins[name] += 1
        return manifest

    def unpin(self, name: str) -> None:
        """The restore was refused."""
        with self._lock:
            self._pins[name] -= 1

    def delete(self, name: str) -> bool:
        """Remove a checkpoint, its manifest first, so that it is never half there.

        False, and it stays, when it is pinned, and while somebody reads it and a minute longer.
        """
        folder = self.path(name)
        with self._lock:
            if self._pins[name] or self._readers[name]:
                return False
            if self._clock() < self._read_until.get(name, 0.0):
                return False
            if not folder.exists():
                return True
            self._going.add(name)
        try:  # without the lock: large files take their time, and others must not wait for them
            self._verified.discard(name)
            failpoints.passing("checkpoint.collecting")
            (folder / MANIFEST).unlink(missing_ok=True)
            failpoints.passing("checkpoint.undone")
            flush_folder(folder)
            shutil.rmtree(folder)
            failpoints.passing("checkpoint.collected")
        finally:
            self._going.discard(name)
        return True

    def set_aside(self, name: str) -> str:
        """Rename a checkpoint out of the way, so that nothing counts on it; its new name."""
        aside = f"{name}{_ASIDE}"
        while (self.folder / aside).exists():
            aside += "_"
        self.path(name).rename(self.folder / aside)
        flush_folder(self.folder)
        return aside

    def sweep(self) -> list[str]:
        """Remove what saves that were cut off have left, and return the names."""
        swept = []
        for name in self.unfinished():
            try:
                shutil.rmtree(self.folder / name)
                swept.append(name)
            except OSError as error:
                log.warning("the unfinished checkpoint %s could not be removed: %s", name, error)
        return swept

    def unfinished(self) -> list[str]:
        """The folders that a save began and did not finish; others are left alone."""
        if not self.folder.is_dir():
            return []
        return sorted(folder.name for folder in self.folder.iterdir() if _unfinished(folder))


def _unfinished(folder: Path) -> bool:
    if not CHECKPOINT_NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    return not (folder / MANIFEST).exists() and all(
        path.is_file() and (path.suffix in _SAVED or path.name.startswith(_DRAFT))
        for path in folder.iterdir()
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    draft = folder / (MANIFEST + ".draft")
    with draft.open("wb") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    failpoints.passing("checkpoint.drafted")
    draft.rename(folder / MANIFEST)
    failpoints.passing("checkpoint.renamed")
    flush_folder(folder)


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    except _NO_MANIFEST as error:
        if is_shortage(error):  # a checkpoint that cannot be looked at now is not one that is not there
            raise
        return None
    return manifest if manifest.info.name == folder.name else None


def _flush(path: Path) -> FileInfo:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the hash is of what the disk holds
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return describe(path)


def describe(path: Path) -> FileInfo:
    """A file as a manifest lists it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return FileInfo(path.name, path.stat().st_size, digest)
