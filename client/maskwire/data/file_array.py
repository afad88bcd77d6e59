"""Arrays of ids in files, read piece by piece.

Files are read and not mapped: a mapped file that somebody cuts short ends the process with SIGBUS, a read
one is an error that names the file. And what is read needs only the file's path in another process, so
that data can be pickled without its content.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]
_OPEN = 128  # files that are kept open
_SEEK = threading.Lock()
_UNKNOWN = -1


class DataChangedError(ValueError):
    """A file of the data was cut, changed, replaced or deleted since it was opened."""


class FileArray:
    """One-dimensional integers in a file; a slice of it is read when asked for."""

    def __init__(
        self,
        path: str | Path,
        dtype: npt.DTypeLike,
        offset: int = 0,
        size: int | None = None,
        stamp: tuple[int, int] | None = None,
    ) -> None:
        """`size` integers from byte `offset` on; by default all.

        `stamp` is the file's size and modification time in nanoseconds, as they were found earlier.
        """
        self._path = Path(path).absolute()  # a job may change its directory
        self._file: _File | None = None
        if stamp is None:
            found = self._path.stat()
            stamp = found.st_size, found.st_mtime_ns
        self._bytes, self._modified = stamp
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._offset = offset
        self.size = (self._bytes - offset) // self.dtype.itemsize if size is None else size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Ids:
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError(f"a file is read in slices without a step, got {part}")
        begin, width = self._offset + start * self.dtype.itemsize, self.dtype.itemsize
        wanted = max(0, stop - start) * width
        try:
            file = self._file or self._open()
            found = os.fstat(file.descriptor)
            read = file.read(wanted, begin)
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if found.st_size != self._bytes:
            raise self._changed(f"it had {self._bytes:,} bytes and has {found.st_size:,}")
        if found.st_mtime_ns != self._modified:
            raise self._changed("it was written to")
        if len(read) != wanted:
            raise self._changed(f"it ended at byte {begin + len(read):,}")
        return np.frombuffer(read, self.dtype)

    def _open(self) -> _File:
        self._file = file = _File(self._path)
        if self._modified == _UNKNOWN:
            self._modified = os.fstat(file.descriptor).st_mtime_ns
        return file

    def _changed(self, why: str) -> DataChangedError:
        return DataChangedError(
            f"{self._path}: the file changed while it was in use as data ({why}): put it back as it was, or "
            "open the data again"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the file on another machine has its own modification time.
        return {**self.__dict__, "_file": None, "_modified": _UNKNOWN}


class Files(Sequence[FileArray]):
    """Files as arrays of bytes; the last few that were read are kept open."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path).absolute() for path in paths]
        found = [path.stat() for path in self._paths]
        self.sizes = np.array([each.st_size for each in found], dtype=np.int64)
        self._modified = np.array([each.st_mtime_ns for each in found], dtype=np.int64)
        self._keep_open()

    def _keep_open(self) -> None:
        # Of what it needs and not of `self`: the files are closed as soon as nobody uses these.
        array = functools.partial(_array, self._paths, self.sizes, self._modified)
        self._arrays = functools.lru_cache(_OPEN)(array)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return self._arrays(int(index))

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_modified": np.full_like(self._modified, _UNKNOWN)}
        del state["_arrays"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_open()


def _array(
    paths: list[Path], sizes: npt.NDArray[np.int64], modified: npt.NDArray[np.int64], index: int
) -> FileArray:
    return FileArray(paths[index], np.uint8, stamp=(int(sizes[index]), int(modified[index])))


class _File:
    """An open file, closed when nobody needs it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, size: int, offset: int) -> bytes:
        """Bytes from `offset` on, fewer only at the file's end."""
        read = self._read(size, offset)
        if len(read) == size or not read:
            return read
        parts = [read]  # the system reads at most 2 GiB at a time
        while read and (left := size - sum(map(len, parts))):
            read = self._read(left, offset + size - left)
            parts.append(read)
        return b"".join(parts)

    def _read(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.descriptor, size, offset)
        with _SEEK:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.read(self.descriptor, size)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
