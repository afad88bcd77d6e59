"""Lines on stderr and in files. A failure to write them must not end the training."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)

PLAIN_EVERY_SECONDS = 10.0
"""How often progress that is not shown as a bar prints a line."""


def tell(text: str) -> None:
    """Print a line on stderr, if it exists and accepts it."""
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


class LineFile:
    """A file to append lines to. After the first failure it logs a warning and drops all later lines.

    It does not retry, since a file with a gap would look complete.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self.failure = ""
        """Why lines are missing; empty: none is missing."""

    def write(self, line: bytes) -> None:
        """Append a line that ends with a newline."""
        left = memoryview(line)
        while left and not self.failure:
            try:
                left = left[os.write(self._file, left) :]
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Close the file."""
        try:
            os.close(self._file)
        except OSError as error:  # some file systems report failed writes only here
            if not self.failure:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = f"{self._path}: no more lines are written ({error.strerror}); training is not affected"
        log.warning("%s", self.failure)
