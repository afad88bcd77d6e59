"""Downloads of checkpoints, which are verified and resume where an earlier attempt stopped.

Each file is written as `FILE.HASH.part` and renamed once its SHA-256 is right. The manifest is downloaded
last, so a folder with a manifest is complete.
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
from maskwire.v1.values import unsharded_name

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
LOCK = ".maskwire-download"
WEIGHTS, EMA = "model.safetensors", "ema.safetensors"
FROZEN = "frozen.safetensors"
"""The file of weights that are never trained, such as those below adapters. The others need this file."""
_BLOCK = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

DownloadProgress = Callable[[int, int], None]
"""A function that is called with the bytes downloaded so far and the bytes of all files."""


class Download:
    """The download of a checkpoint into a folder, which is locked against other downloads meanwhile."""

    def __init__(
        self,
        info: CheckpointInfo,
        folder: Path,
        *,
        weights: bool,
        ema: bool,
        on_progress: DownloadProgress | None,
    ) -> None:
        self.folder = folder
        self._info = info
        self._on_progress = on_progress or (lambda *_: None)
        names = set(info.files)
        for name in names:  # they become paths on this machine
            if not _NAME.fullmatch(name):
                raise CheckpointError(
                    f"checkpoint {info.name!r} has a file with an unsafe name: {name!r}; a name has letters, "
                    "digits, '.', '_' and '-', and begins with a letter or digit. Check the server's storage"
                )
        if weights or ema:
            there = {unsharded_name(name) for name in names}
            average = {EMA} if ema else there & {EMA}  # with the weights, if there is one
            wanted = average | ({WEIGHTS} if weights else set()) | (there & {FROZEN})
            for name in sorted(wanted - there):
                raise CheckpointError(
                    f"checkpoint {info.name!r} has no file {name}"
                    + ("; the run keeps no moving average: leave ema out" if name == EMA else "")
                )
            names = {name for name in names if unsharded_name(name) in wanted}
        self._files = [
            PartialFile(info.name, folder, name, info.files[name], self._report) for name in sorted(names)
        ]
        self._total = sum(file.total for file in self._files)
        self._manifest = PartialFile(info.name, folder, MANIFEST, None, lambda: None)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = _lock(folder), os.getpid()
        try:
            self._resuming = self._check_folder()
        except BaseException:
            self._unlock()
            raise

    def _check_folder(self) -> bool:
        """Whether the folder has this checkpoint's manifest. Raises CheckpointError if it has another one."""
        path = self.folder / MANIFEST
        if not path.exists():
            return False
        try:
            manifest = json.loads(path.read_bytes())
            found = manifest["name"], manifest["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a checkpoint's manifest ({error!r}); choose another folder for the download"
            ) from error
        if found != (self._info.name, self._info.digest.hex()):
            raise CheckpointError(
                f"{self.folder} holds checkpoint {found[0]!r} with digest {found[1]}, not "
                f"{self._info.name!r} with digest {self._info.digest.hex()}; choose another folder"
            )
        return True

    def missing(self) -> list[PartialFile]:
        """Verify the files that are already in the folder; return the missing files, the manifest last."""
        for file in self._files:
            file.open()
            if file.name_taken and not self._resuming:
                raise CheckpointError(
                    f"{self.folder / file.name} exists and is not this checkpoint's file; choose another "
                    "folder for the download"
                )
        missing = [file for file in self._files if not file.complete]
        self._report()
        if missing or not (self.folder / MANIFEST).exists():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest must be complete
            self._manifest.open()
            missing.append(self._manifest)
        return missing

    def finish(self) -> None:
        """Unlock the folder, and make the names of its files durable on the disk."""
        self._unlock()
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _unlock(self) -> None:
        if os.getpid() == self._process:  # in a forked child: the parent is still writing
            (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._lock)

    def _report(self) -> None:
        self._on_progress(sum(file.size for file in self._files), self._total)


def _lock(folder: Path) -> int:
    """Lock the folder against another download; return the descriptor that holds the lock.

    Raises CheckpointError if another download holds the lock.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CheckpointError(
            f"another download is writing to {folder}; wait until it has finished, or choose another folder"
        ) from None
    return descriptor


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Context manager that adds the file's path and a remedy to the OSError of a failed write."""
    try:
        yield
    except OSError as error:
        text = f"{error.strerror}; fix that, then run the same download again: it resumes"
        raise OSError(error.errno, text, str(path)) from error


class PartialFile:
    """One file of a checkpoint's download, which may be partly downloaded."""

    def __init__(
        self,
        checkpoint: str,
        folder: Path,
        name: str,
        expected: FileInfo | None,
        on_change: Callable[[], None],
    ) -> None:
        """Prepare to download `folder`/`name`. Call `open` before anything else.

        `expected` is the file's size and hash; None for the manifest, whose first chunk contains them.
        `on_change` is called after each chunk.
        """
        self._checkpoint, self.name, self._on_change = checkpoint, name, on_change
        self._path = folder / name
        self._expected = expected
        self._draft = folder / (f"{name}.{expected.sha256.hex()[:12]}.part" if expected else f"{name}.part")
        self._sha = hashlib.sha256()
        self.size = 0
        """The number of bytes downloaded so far."""
        self.complete = False
        """Whether the file was downloaded, verified and renamed."""

    @property
    def total(self) -> int:
        """The size of the complete file in bytes; 0 while it is not known."""
        return self._expected.size_bytes if self._expected else 0

    @property
    def name_taken(self) -> bool:
        """Whether a different file already exists under this name."""
        return not self.complete and self._path.exists()

    def open(self) -> None:
        """Read and hash the bytes that an earlier attempt downloaded, to resume after them."""
        self._read(self._path)
        if self._expected is not None and FileInfo(self.size, self._sha.digest()) == self._expected:
            self.complete = True
            return
        if self._expected is None:  # the manifest is small, and nothing could verify an old part of it
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

    def request(self) -> pb.DownloadCheckpointRequest:
        """Return the request for the rest of the file."""
        return pb.DownloadCheckpointRequest(name=self._checkpoint, file=self.name, offset_bytes=self.size)

    def append(self, chunk: pb.DownloadCheckpointResponse) -> None:
        """Append a chunk. Raises CheckpointError if the chunk is damaged or is not the next one."""
        if self._expected is None:
            self._expected = FileInfo(chunk.file.size_bytes, chunk.file.sha256)
        if FileInfo(chunk.file.size_bytes, chunk.file.sha256) != self._expected:
            raise CheckpointError(
                f"{self.name} of checkpoint {self._checkpoint!r} changed on the server during the download; "
                "start the download again"
            )
        data = chunk.data  # protobuf copies it at each access
        if chunk.offset_bytes != self.size or zlib.crc32(data) != chunk.crc32:
            raise CheckpointError(
                f"{self.name}: the chunk at byte {chunk.offset_bytes} arrived damaged or out of order; "
                "repeat the download, which resumes from there"
            )
        with _naming(self._draft), self._draft.open("ab") as file:
            file.write(data)
        self._sha.update(data)
        self.size += len(data)
        if self.size >= self.total:
            self._close()
        self._on_change()

    def _close(self) -> None:
        if FileInfo(self.size, self._sha.digest()) != self._expected:
            self._draft.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.name} of checkpoint {self._checkpoint!r} does not match its SHA-256; it was deleted "
                "from the folder. Download again; if that fails too, the server's copy is damaged: use "
                "another checkpoint"
            )
        with _naming(self._draft), self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        self._draft.rename(self._path)
        self.complete = True
