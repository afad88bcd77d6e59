"""Measures how much of the file of SQLite's write-ahead log is in use.

After a merge, the file is overwritten from its start, because a flush is faster if the file does not grow.
Its size then does not show how much is in use, so the frames are counted. The format is documented in
https://www.sqlite.org/fileformat2.html#walformat: the header has the page size at byte 8 and the salt at byte
16; each frame has the salt at its byte 8, and ends with a page. Frames from before the last merge have
another salt.
"""

from __future__ import annotations

import os
from pathlib import Path

_HEADER, _FRAME_HEADER = 32, 24
_SALT = 8  # bytes
_SALT_AT, _SALT_END, _FRAME_SALT_AT = 16, 24, 8
_STEP = 16  # frames: about as many as one batch of 64 KiB takes


class WriteAheadLog:
    """The write-ahead log of one journal. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._salt = self._merged = b""
        self._frame = 0  # the size of a frame with its page
        self._frames = self._added = 0

    def size(self) -> int:
        """The size of the file in bytes."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def used_bytes(self) -> int:
        """The number of bytes not merged into the database yet; may be too low during a transaction."""
        if not self._salt and not self._read_header():
            return 0
        before = self._frames
        as_before = before + self._added  # transactions often have the same size
        if self._in_use(as_before) and not self._in_use(as_before + 1):
            self._frames = as_before
        else:
            self._count()
        self._added = self._frames - before
        return _HEADER + self._frames * self._frame

    def merged(self) -> None:
        """Note that everything in the log is in the database."""
        self._merged = self._read(_HEADER, 0)[_SALT_AT:_SALT_END]
        self._salt = b""

    def _read_header(self) -> bool:
        """Read the header. Returns False if SQLite has not renewed it since the last merge.

        SQLite renews the header at the first write after a merge.
        """
        header = self._read(_HEADER, 0)
        salt = header[_SALT_AT:_SALT_END]
        if len(header) < _HEADER or salt == self._merged:
            return False
        self._salt, self._frames = salt, 0
        self._frame = _FRAME_HEADER + int.from_bytes(header[8:12], "big")
        return True

    def _count(self) -> None:
        """Count the frames in use, starting from those already counted."""
        step = _STEP
        while self._in_use(self._frames + step):
            self._frames += step
            step *= 2
        while step := step // 2:
            if self._in_use(self._frames + step):
                self._frames += step

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _in_use(self, count: int) -> bool:
        """Whether at least `count` frames of the log are in use."""
        at = _HEADER + (count - 1) * self._frame + _FRAME_SALT_AT
        return not count or self._read(_SALT, at) == self._salt

    def _read(self, size: int, at: int) -> bytes:
        if self._file < 0:
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
        return os.pread(self._file, size, at)
