"""Standard streams whose failures do not stop a command.

A reader that has exited, a full disk, a closed descriptor or an encoding that lacks a character must neither
stop a command half-way nor look like a user's mistake. Characters that cannot be encoded are replaced. After
the first failed write the rest of the output is dropped, and `finish` reports it.
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
"""Exit code of a command that did its work but could not write the result."""


class _Sink(io.RawIOBase):
    """Writes to a descriptor until a write fails, then drops the rest."""

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
            except BlockingIOError:  # another process that shares the pipe made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


def protect() -> None:
    """Replace stdout and stderr by streams that do not fail. Call it before any file is opened."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened gets this number, and the stream's output with it.
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
        except (OSError, ValueError):  # a stream without a file, of whoever runs the command in-process
            return old  # type: ignore[no-any-return]
        if os.name == "nt":  # Windows consoles are not files
            old.reconfigure(errors=errors)
            return old  # type: ignore[no-any-return]
        sink, encoding, line_buffering = _Sink(descriptor), old.encoding, old.line_buffering
    return io.TextIOWrapper(
        io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=line_buffering
    )


def _failure() -> OSError | None:
    """The error that stopped writing to stdout."""
    raw: Any = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Sink) else None


def reader_gone() -> bool:
    """Whether the reader of stdout has exited, as in `maskwire status --watch | head`."""
    failure = _failure()
    return failure is not None and failure.errno == errno.EPIPE


def finish(code: Any) -> tuple[Any, str]:
    """Return the exit code of a command that ended with `code`, and a message for stderr or ''."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    failure = _failure()
    if failure is None or code or reader_gone():
        return code, ""
    return OUTPUT, (
        f"the result could not be written to stdout ({failure.strerror}); the command's work is done"
    )
