"""Files at addresses such as s3://bucket/texts/*.jsonl, opened through fsspec.

Each backend of fsspec raises exceptions of its own. This module converts them to errors with the address.
"""

from __future__ import annotations

import fnmatch
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

from maskwire.data.file_discovery import EMPTY, HIDDEN, PREPARED, Skipped, names, reasons, skip
from maskwire.data.file_types import HEAD_BYTES
from maskwire.data.hugging_face import dataset_folders
from maskwire.data.prepared_folder import METADATA

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+(::|://)")
_CONNECTIONS = 16  # connections at once that read the beginnings of files
_BUFFER = 2**18  # bytes


def is_remote(path: object) -> bool:
    """Whether a path is an address with a protocol, such as s3://bucket/key."""
    return isinstance(path, str) and bool(_ADDRESS.match(path))


class Remote:
    """A remote file, which fsspec opens."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.name = str(system.unstrip_protocol(path))
        found = system.info(path)
        self.size = int(found.get("size") or 0)
        version = {
            name: str(found[name]) for name in ("ETag", "etag", "mtime", "LastModified") if name in found
        }
        self.identity = f"{self.name} {self.size} {sorted(version.items())}"
        self.head = b""

    def read_head(self) -> None:
        """Read the first `HEAD_BYTES` bytes into `head`. A backend that reads blocks reads no more."""
        with self._system.open(self._path, "rb", block_size=HEAD_BYTES) as file:
            self.head = file.read(HEAD_BYTES)

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes. The result is seekable. Raises OSError with the address."""
        with _named(self.name, "opened", OSError):
            file = self._system.open(self._path, "rb")
        return io.BufferedReader(_Reads(self.name, file), _BUFFER)


class _Reads(io.RawIOBase):
    """A raw stream over a file of fsspec. It converts the backend's errors to OSError with the address."""

    def __init__(self, name: str, file: Any) -> None:
        self._name, self._file = name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _named(self._name, "read", OSError):
            part = self._file.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _named(self._name, "read", OSError):
            self._file.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _named(name: str, done: str, kind: type[Exception]) -> Iterator[None]:
    """Convert an exception of a backend, which can have any type, to a `kind` that names the address."""
    try:
        yield
    except Exception as error:
        raise kind(
            f"{name}: cannot be {done}: {type(error).__name__}: {error}; check the address, the network, and "
            "the credentials that the protocol's package uses"
        ) from error


def find(address: str, pattern: str, skipped: Skipped) -> list[Remote]:
    """Return the non-empty files at an address: one file, those in a folder, or those that match a glob.

    The files are sorted by path. Files that are left out are added to `skipped`. Raises ValueError if no file
    is found, if fsspec or the protocol's package is missing, and for any error of the backend.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f'{address}: a remote address needs the package `fsspec`: pip install "maskwire[data]"'
        ) from None
    with _named(address, "opened", ValueError):
        system, path = url_to_fs(address)
        if any(sign in path for sign in "*?["):
            paths = [each for each in system.glob(path) if system.isfile(each)]
        elif system.isdir(path):
            paths = _in_folder(system, path, pattern, skipped)
        else:
            paths = [path]
    if data_sets := dataset_folders(paths):
        raise ValueError(
            f"{address} contains a saved data set ({names(data_sets)}): copy it to a local folder, or give "
            "the object that datasets.load_from_disk returns"
        )
    prepared = {PurePosixPath(each).parent for each in paths if PurePosixPath(each).name == METADATA}
    for folder in sorted(prepared):
        skip(skipped, PREPARED, system.unstrip_protocol(str(folder)))
    paths = [each for each in paths if not prepared.intersection(PurePosixPath(each).parents)]
    with _named(address, "read", ValueError):
        files = [Remote(system, each) for each in sorted(paths)]
        workers = _CONNECTIONS if getattr(system, "async_impl", False) else 1  # others may not be thread-safe
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(Remote.read_head, files))
    found = [file for file in files if file.head]
    for file in files:
        if not file.head:
            skip(skipped, EMPTY, file.name)
    if not found:
        raise ValueError("; ".join([f"{address}: no matching file has content", *reasons(skipped)]))
    return found


def _in_folder(system: Any, folder: str, pattern: str, skipped: Skipped) -> list[str]:
    found: list[str] = []
    for each in system.find(folder):
        path = PurePosixPath(each)
        if path.name != METADATA and not fnmatch.fnmatch(path.name, pattern):
            continue
        if any(part.startswith(".") for part in PurePosixPath(each.removeprefix(folder)).parts):
            skip(skipped, HIDDEN, system.unstrip_protocol(each))
        else:
            found.append(each)
    return found
