"""Arrays of integers in files, read slice by slice.

The files are read, not memory-mapped: truncating a mapped file kills the process with SIGBUS, whereas a
failed read raises an error that names the file. A pickled array holds the path and no ids, so that another
process reads the same file.
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
_MAX_OPEN = 128  # files
_SEEK = threading.Lock()
_UNKNOWN = -1


class DataChangedError(ValueError):
    """A data file was truncated, changed, replaced or deleted after it was opened."""


class FileArray:
    """A one-dimensional array of integers in a file. Taking a slice reads only that part of the file."""

    def __init__(
        self,
        path: str | Path,
        dtype: npt.DTypeLike,
        offset: int = 0,
        size: int | None = None,
        stamp: tuple[int, int] | None = None,
    ) -> None:
        """Describe `size` integers that start at byte `offset` of a file; by default, all up to its end.

        `stamp` is the file's size in bytes and its modification time in nanoseconds, if the caller knows
        them.
        """
        self._path = Path(path).absolute()  # the process may change its working directory
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
            raise ValueError(f"a slice of an array in a file must have step 1, got {part}")
        begin, width = self._offset + start * self.dtype.itemsize, self.dtype.itemsize
        wanted = max(0, stop - start) * width
        try:
            file = self._file or self._open()
            found = os.fstat(file.descriptor)
            read = file.read(wanted, begin)
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if found.st_size != self._bytes:
            raise self._changed(f"the file had {self._bytes:,} bytes and now has {found.st_size:,}")
        if found.st_mtime_ns != self._modified:
            raise self._changed("the modification time of the file changed")
        if len(read) != wanted:
            raise self._changed(f"the file ended early, at byte {begin + len(read):,}")
        return np.frombuffer(read, self.dtype)

    def _open(self) -> _File:
        self._file = file = _File(self._path)
        if self._modified == _UNKNOWN:
            self._modified = os.fstat(file.descriptor).st_mtime_ns
        return file

    def _changed(self, why: str) -> DataChangedError:
        return DataChangedError(
            f"{self._path}: the file changed while it was in use as data ({why}); restore the file, or open "
            "the data again"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the file on another machine has a different modification time.
        return {**self.__dict__, "_file": None, "_modified": _UNKNOWN}


class Files(Sequence[FileArray]):
    """Files as arrays of bytes; only the most recently read ones are kept open."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path).absolute() for path in paths]
        found = [path.stat() for path in self._paths]
        self.sizes = np.array([each.st_size for each in found], dtype=np.int64)
        self._modified = np.array([each.st_mtime_ns for each in found], dtype=np.int64)
        self._keep_open()

    def _keep_open(self) -> None:
        # The cache must not refer to `self`: then the files are closed as soon as this object is deallocated.
        array = functools.partial(_array, self._paths, self.sizes, self._modified)
        self._arrays = functools.lru_cache(_MAX_OPEN)(array)

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
    """An open file, which is closed when this object is deallocated."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, size: int, offset: int) -> bytes:
        """Read `size` bytes at byte `offset`; return fewer only at the end of the file."""
        read = self._read(size, offset)
        if len(read) == size or not read:
            return read
        parts = [read]  # the operating system reads at most 2 GiB per call
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
