"""The files of one checkpoint: write them, read them back, and describe them by size and SHA-256."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from maskwire_server import failpoints
from maskwire_server.errors import is_shortage
from maskwire_server.journal.fsync import flush_folder
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.requests import CHECKPOINT_NAME
from maskwire_server.results import FileInfo

NOT_A_MANIFEST = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The exceptions that reading a damaged manifest can raise."""
_SAVED = {".safetensors", ".json", ".draft"}
PARTS = "parts-"
"""The prefix of the name of the folder in which several ranks write the files of a checkpoint."""
_DRAFT = ".tmp"  # the prefix of the names that safetensors writes to before it renames the file
_ATTEMPTS = 100  # to delete a folder in which another process renames and creates files


class Snapshot(Protocol):
    """A copy of the trainer's state in host memory."""

    def write(self, folder: Path) -> Sequence[FileInfo] | None:
        """Write the state's files into `folder`, except files that exist already. The caller flushes them.

        If several ranks wrote the files and made them durable, these files are returned; otherwise None.
        """


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into a checkpoint's folder, durably and atomically."""
    write_manifest_bytes(folder, manifest.to_json())


def write_manifest_bytes(folder: Path, data: bytes) -> None:
    """Write an encoded manifest into a checkpoint's folder, durably and atomically."""
    draft = folder / (MANIFEST + ".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    failpoints.passing("checkpoint.drafted")
    draft.rename(folder / MANIFEST)
    failpoints.passing("checkpoint.renamed")
    flush_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a checkpoint's folder; None if it is missing, damaged, or names another checkpoint."""
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    except NOT_A_MANIFEST as error:
        if is_shortage(error):  # the checkpoint may be intact
            raise
        return None
    return manifest if manifest.info.name == folder.name else None


def is_unfinished(folder: Path) -> bool:
    """Whether a save started to write this folder and did not finish."""
    if not CHECKPOINT_NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    return not (folder / MANIFEST).exists() and all(
        all(map(_is_of_save, path.iterdir()))
        if path.name.startswith(PARTS) and path.is_dir()
        else _is_of_save(path)
        for path in folder.iterdir()
    )


def _is_of_save(path: Path) -> bool:
    """Whether a save wrote this file. A file that is gone was renamed by a rank that is still writing."""
    named = path.suffix in _SAVED or path.name.startswith(_DRAFT)
    return named and (path.is_file() or not os.path.lexists(path))


def remove_unfinished(folder: Path) -> None:
    """Delete the folder of an interrupted save. A rank of an earlier group may still be writing to it."""
    for _ in range(_ATTEMPTS - 1):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or not folder.exists():
                raise
        else:
            return
    shutil.rmtree(folder)


def flush(path: Path) -> FileInfo:
    """Make a file durable, and describe it as read back from the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return describe(path, from_disk=True)


def described(path: Path, linked: Mapping[str, FileInfo], of_ranks: Mapping[str, FileInfo]) -> FileInfo:
    """Describe a file. First make it durable, unless a rank did so or it is a link to a durable file."""
    name = path.name
    if name in of_ranks:
        return of_ranks[name]
    return linked[name] if name in linked and path.stat().st_nlink > 1 else flush(path)


def describe(path: Path, *, from_disk: bool = False) -> FileInfo:
    """Return a file's name, size and SHA-256. `from_disk` reads the disk instead of the page cache."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256").digest()
    return FileInfo(path.name, path.stat().st_size, digest)
