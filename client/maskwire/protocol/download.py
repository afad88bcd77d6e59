"""A checkpoint's files on their way here: checked, and gone on with where an earlier attempt ended.

Each file grows under a name of its own (`FILE.HASH.part`) and gets its name once its SHA-256 is right; the
manifest comes last, so that a folder with a manifest is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from maskwire.errors import CheckpointError
from maskwire.results import CheckpointInfo, FileInfo
from maskwire.v1 import training_service_pb2 as pb

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
LOCK = ".maskwire-download"
WEIGHTS, EMA = "model.safetensors", "ema.safetensors"
_BLOCK = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes of all files."""


class Target:
    """The folder that a checkpoint comes to."""

    def __init__(
        self, info: CheckpointInfo, folder: Path, *, weights: bool, ema: bool, on_progress: Progress | None
    ) -> None:
        self.folder = folder
        self._info = info
        self._on_progress = on_progress or (lambda *_: None)
        names = set(info.files)
        for name in names:  # they become paths here
            if not _NAME.fullmatch(name):
                raise CheckpointError(f"checkpoint {info.name!r} has a file of an unsafe name: {name!r}")
        if weights or ema:
            average = {EMA} if ema else names & {EMA}  # asked for, or what belongs to the weights
            names = average | ({WEIGHTS} if weights else set())
        for name in sorted(names - set(info.files)):
            raise CheckpointError(
                f"checkpoint {info.name!r} has no {name}"
                + ("; the run keeps no moving average: leave ema out" if name == EMA else "")
            )
        self._parts = [Part(info.name, folder, name, info.files[name], self._moved) for name in sorted(names)]
        self._total = sum(part.total for part in self._parts)
        self._manifest = Part(info.name, folder, MANIFEST, None, lambda: None)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = _lock(folder), os.getpid()
        try:
            self._ours = self._refuse_another()
        except BaseException:
            self._unlock()
            raise

    def _refuse_another(self) -> bool:
        """A folder that holds another checkpoint is left alone; True for one that holds this one."""
        path = self.folder / MANIFEST
        if not path.exists():
            return False
        try:
            there = json.loads(path.read_bytes())
            same = there["name"] == self._info.name and there["digest"] == self._info.digest.hex()
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise CheckpointError(f"{self.folder} holds another checkpoint; name another folder")
        return True

    def missing(self) -> list[Part]:
        """The files that are not here yet, the manifest last; what is here is read and hashed."""
        for part in self._parts:
            part.open()
            if part.taken and not self._ours:
                raise CheckpointError(
                    f"{self.folder / part.name} exists and is not this checkpoint's; name another folder"
                )
        missing = [part for part in self._parts if not part.whole]
        self._moved()
        if missing or not (self.folder / MANIFEST).exists():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # until what was asked for is whole
            self._manifest.open()
            missing.append(self._manifest)
        return missing

    def finish(self) -> None:
        """Make the files' names durable, and let others write here."""
        self._unlock()
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _unlock(self) -> None:
        if os.getpid() == self._process:  # a forked child has a copy of this; the parent is still writing
            (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._lock)

    def _moved(self) -> None:
        self._on_progress(sum(part.size for part in self._parts), self._total)


def _lock(folder: Path) -> int:
    """Keep a second download out of the folder; the descriptor holds the lock."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CheckpointError(
            f"another download writes into {folder}; wait for it, or name another folder"
        ) from None
    return descriptor


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file a failed write was, which the system does not, and how to go on."""
    try:
        yield
    except OSError as error:
        words = f"{error.strerror}; fix that, then run the same download again: it resumes from what is here"
        raise OSError(error.errno, words, str(path)) from error


class Part:
    """One file, growing."""

    def __init__(
        self,
        checkpoint: str,
        folder: Path,
        name: str,
        file: FileInfo | None,
        moved: Callable[[], None],
    ) -> None:
        self._checkpoint, self.name, self._moved = checkpoint, name, moved
        self._path = folder / name
        self._expected = file
        self._draft = folder / (f"{name}.{file.sha256.hex()[:12]}.part" if file else f"{name}.part")
        self._sha = hashlib.sha256()
        self.size = 0
        """Bytes that are here."""
        self.whole = False
        """Here, checked, and under its own name."""

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return self._expected.size_bytes if self._expected else 0

    @property
    def taken(self) -> bool:
        """Something else has the file's name."""
        return not self.whole and self._path.exists()

    def open(self) -> None:
        """Look at what is here already."""
        self._read(self._path)
        if self._expected is not None and FileInfo(self.size, self._sha.digest()) == self._expected:
            self.whole = True
            return
        if self._expected is None:  # the manifest is small, and its hash not known beforehand
            self._draft.unlink(missing_ok=True)
        self._read(self._draft)
        if self._expected is not None and self.size >= self.total:
            self._close()

    def _read(self, path: Path) -> None:
        self._sha, self.size = hashlib.sha256(), 0
        if path.exists():
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    self._sha.update(block)
                    self.size += len(block)

    def here(self) -> int:
        """`size`, to be asked again."""
        return self.size

    def request(self) -> pb.DownloadCheckpointRequest:
        """What asks for the rest."""
        return pb.DownloadCheckpointRequest(name=self._checkpoint, file=self.name, offset_bytes=self.size)

    def take(self, chunk: pb.DownloadCheckpointResponse) -> None:
        """Append a chunk; raises CheckpointError for one that is not the next or was damaged on the way."""
        if self._expected is None:
            self._expected = FileInfo(chunk.file.size_bytes, chunk.file.sha256)
        if FileInfo(chunk.file.size_bytes, chunk.file.sha256) != self._expected:
            raise CheckpointError(
                f"{self.name} of checkpoint {self._checkpoint!r} changed on the server meanwhile; download "
                "again"
            )
        if chunk.offset_bytes != self.size or zlib.crc32(chunk.data) != chunk.crc32:
            raise CheckpointError(
                f"{self.name}: the chunk at byte {chunk.offset_bytes} arrived damaged or out of order; the "
                "same call goes on from there"
            )
        with _naming(self._draft), self._draft.open("ab") as file:
            file.write(chunk.data)
        self._sha.update(chunk.data)
        self.size += len(chunk.data)
        if self.size >= self.total:
            self._close()
        self._moved()

    def _close(self) -> None:
        if FileInfo(self.size, self._sha.digest()) != self._expected:
            self._draft.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.name} of checkpoint {self._checkpoint!r} does not match its SHA-256; it was deleted "
                "here: download again, and if that fails too the server's copy is damaged"
            )
        with _naming(self._draft), self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        self._draft.rename(self._path)
        self.whole = True
