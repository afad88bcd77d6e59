"""Files at addresses such as s3://bucket/texts/*.jsonl, opened through fsspec."""

from __future__ import annotations

import fnmatch
import re
from pathlib import PurePosixPath
from typing import IO, Any, cast

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+(::|://)")


def is_remote(path: object) -> bool:
    """Whether a path is an address with a protocol, such as s3://bucket/key."""
    return isinstance(path, str) and bool(_ADDRESS.match(path))


class Remote:
    """A file that fsspec can open."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.address = system.unstrip_protocol(path)
        found = system.info(path)
        self.size = int(found.get("size") or 0)
        version = {
            name: str(found[name]) for name in ("ETag", "etag", "mtime", "LastModified") if name in found
        }
        self.identity = f"{self.address} {self.size} {sorted(version.items())}"

    def open(self) -> IO[bytes]:
        """Open the file for reading; the result can seek."""
        return cast(IO[bytes], self._system.open(self._path, "rb"))


def find(address: str, pattern: str) -> list[Remote]:
    """The non-empty files at an address: one file, the files of a folder, or those that match a glob.

    Sorted by path. Raises ValueError if there is none, or fsspec or the protocol's package is missing.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f'{address}: a remote address needs the package `fsspec`: pip install "maskwire[data]"'
        ) from None
    try:
        system, path = url_to_fs(address)
        if any(sign in path for sign in "*?["):
            paths = [each for each in system.glob(path) if system.isfile(each)]
        elif system.isdir(path):
            paths = [each for each in system.find(path) if fnmatch.fnmatch(PurePosixPath(each).name, pattern)]
        else:
            paths = [path]
        files = [Remote(system, each) for each in sorted(paths)]
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(f"{address}: cannot be opened: {error or type(error).__name__}") from error
    found = [file for file in files if file.size or len(files) == 1]
    if not found:
        raise ValueError(f"{address}: there is no non-empty file that matches")
    return found
