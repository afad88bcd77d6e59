"""Standard streams that never fail, so that a command's exit code depends on its work, not on its output.

Four problems must not stop a command halfway or look like a user error: a reader that has exited, a full
disk, a closed descriptor, and a character that the encoding lacks. Characters that cannot be encoded are
replaced. After the first failed write, the rest of the output is discarded, and `finish` reports the failure.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

OUTPUT = 7
"""Exit code of a command that did its work but could not write its output."""


class _Sink(io.RawIOBase):
    """A raw stream that writes to a descriptor, and discards all output after the first failed write."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another process made the pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


def protect() -> None:
    """Replace stdout and stderr with streams that never fail. Call it before opening any file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file opened would get this descriptor, and receive the stream's output.
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _stream(sys.stdout, "replace")
    sys.stderr = _stream(sys.stderr, "backslashreplace")


def _stream(old: Any, errors: str) -> TextIO:
    if old is None:
        sink, encoding, line_buffering = _Sink(os.open(os.devnull, os.O_WRONLY)), "utf-8", True
    else:
        try:
            descriptor = old.fileno()
        except (OSError, ValueError):  # not a file, for example in a test
            return old  # type: ignore[no-any-return]
        if os.name == "nt":  # Windows consoles are not files
            old.reconfigure(errors=errors)
            return old  # type: ignore[no-any-return]
        sink, encoding, line_buffering = _Sink(descriptor), old.encoding, old.line_buffering
    return io.TextIOWrapper(
        io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=line_buffering
    )


def _failure() -> OSError | None:
    """Return the error of the first failed write to stdout; None if no write failed."""
    raw: Any = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Sink) else None


def reader_gone() -> bool:
    """Whether the reader of stdout has closed the pipe, as in `maskwire status --watch | head`."""
    failure = _failure()
    return failure is not None and failure.errno == errno.EPIPE


def finish(code: Any) -> tuple[Any, str]:
    """Flush the streams, and return a command's exit code and a message for stderr, which may be empty.

    The exit code is `code`, or OUTPUT if the command succeeded but its output could not be written.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    failure = _failure()
    if failure is None or code or reader_gone():
        return code, ""
    return OUTPUT, (
        f"the command finished, but its output could not be written to stdout ({failure.strerror})"
    )
