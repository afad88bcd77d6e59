"""Standard streams that never fail: whatever becomes of its output, a command ends as its work did.

A reader that has gone, a full disk, a closed descriptor or an encoding without a character must neither end
a command half-way nor look like a mistake of its user. What cannot be encoded is replaced; after the first
failure the rest is dropped, and `finish` says so.
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
"""The exit code of a command that did its work and could not write what came of it."""


class _Sink(io.RawIOBase):
    """Writes to a descriptor until that fails, and drops the rest."""

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
            except BlockingIOError:  # whoever else has the pipe made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


def protect() -> None:
    """Make stdout and stderr streams that never fail. To be called before anything else is opened."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Or the next file that is opened gets this number, and with it what is written to the stream.
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
        except (OSError, ValueError):  # somebody's own stream
            return old  # type: ignore[no-any-return]
        if os.name == "nt":  # whose consoles are no files
            old.reconfigure(errors=errors)
            return old  # type: ignore[no-any-return]
        sink, encoding, line_buffering = _Sink(descriptor), old.encoding, old.line_buffering
    return io.TextIOWrapper(
        io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=line_buffering
    )


def _failure() -> OSError | None:
    """What ended the writing to stdout."""
    raw: Any = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Sink) else None


def reader_gone() -> bool:
    """Whether whoever read stdout has stopped: `maskwire status --watch | head`."""
    failure = _failure()
    return failure is not None and failure.errno == errno.EPIPE


def finish(code: Any) -> tuple[Any, str]:
    """The exit code of a command that ends with `code`, and what to say on stderr first if anything."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    failure = _failure()
    if failure is None or code or reader_gone():
        return code, ""
    return OUTPUT, (
        f"the result could not be written to stdout ({failure.strerror}); what the command did is done"
    )
