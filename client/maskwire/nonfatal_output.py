"""Writes lines to stderr and to files for a training loop, which a failed write must not end."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

PLAIN_EVERY_SECONDS = 10.0
"""Seconds between two lines of progress where no bar is shown."""


def tell(text: str) -> None:
    """Print a line on stderr. Does nothing if stderr does not exist or cannot be written to."""
    stream = sys.stderr
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    with contextlib.suppress(OSError, ValueError):
        return sys.stderr is not None and sys.stderr.isatty()
    return False


def check_in_place(path: Path, file: int) -> None:
    """Raise OSError if a path no longer names an open file, so that further writes would be lost.

    path: An absolute path, because the program may change its current folder.
    file: The descriptor of the open file.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(path.stat(), os.fstat(file)):
            return
    raise OSError(errno.ENOENT, "the file was deleted, moved or replaced while it was in use")


class LineFile:
    """A file to which lines of bytes are appended."""

    def __init__(self, path: str | Path) -> None:
        """Open the file for appending, or create it. Raises OSError if it cannot be opened."""
        self._path = Path(path).absolute()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, line: bytes) -> None:
        """Append a line that ends with a newline.

        Raises OSError if the line was not written completely, or if the file was deleted, moved or replaced.
        Do not write again after an error: a file with a gap would look complete.
        """
        self.check()
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]

    def check(self) -> None:
        """Raise OSError if the file was deleted, moved or replaced while it was open."""
        check_in_place(self._path, self._file)

    def close(self) -> None:
        """Close the file.

        Raises OSError if the file was deleted, moved or replaced, or if a write failed, which some file
        systems report only when the file is closed.
        """
        try:
            self.check()
        finally:
            os.close(self._file)
