"""How the command ends: its exit codes, and errors as people and programs can read them."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from maskwire.cli.display import OutputError
from maskwire.data.files import DataChangedError
from maskwire.errors import (
    AccessError,
    HistoryError,
    MaskwireError,
    SessionError,
    UnavailableError,
)
from maskwire.output import tell
from maskwire.streams import OUTPUT

REFUSED, USAGE, UNAVAILABLE, SESSION, HISTORY, ACCESS = 1, 2, 3, 4, 5, 6
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM

CODES = {
    0: "done, also if the reader of the output closes it early",
    REFUSED: "refused: the message says why, nothing changed, also for a value that the server checks, such "
    "as a checkpoint's name or --length; or the server is not healthy",
    USAGE: "wrong usage: an option, a path or data that cannot be used",
    UNAVAILABLE: "no answer from the server within --retry-for",
    SESSION: "the run is not as expected: another writer has it or took it over, or it was restored",
    HISTORY: "server and client disagree about what was trained: look at the server's storage",
    ACCESS: "access denied: TLS or token rejected",
    OUTPUT: "output lost: the result, `--metrics` or another file could not be written, as on a full disk; "
    "what was trained is safe",
    INTERRUPTED: "interrupted by Ctrl-C; the same command goes on",
    TERMINATED: "ended by SIGTERM; the same command goes on",
}

DATA_IN_USE = "DATA_IN_USE"  # of an error without a reason
_CURES = {
    "DATA_CHANGED": {"(allow_changed_data)": "(--allow-changed-data)"},
    DATA_IN_USE: {
        "or open the data again": "or run the command again; `maskwire train` then needs --allow-changed-data"
    },
    "HALTED": {"open a session with takeover": "run the command again with --takeover"},
    "WRITER_PRESENT": {"or take over": "or take over (--takeover)"},
    "UNAUTHENTICATED": {
        "one 'authorization: Bearer TOKEN' in the call's metadata": "a token: give the file that holds it "
        "(--token-file, or MASKWIRE_TOKEN_FILE)"
    },
    "OUT_OF_RESOURCES": {"; retry": "; run the command again"},
    "RECOVERING": {
        "; retry with the same request id": "; run the command again",
        "; retry": "; run the command again",
    },
}
"""By reason: the cure that an error names for Python code, and the one for the command line."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_signal: int | None = None  # that broke the command off


def on_signals() -> None:
    """Let SIGTERM end a command as Ctrl-C does: cleanly at the first signal, at once at the second."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        global _signal
        if _signal is not None:
            os._exit(128 + number)  # whatever was acknowledged is safe
        _signal = number
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def interrupted() -> typer.Exit:
    """The end of a command that a signal broke off."""
    return typer.Exit(TERMINATED if _signal == signal.SIGTERM else INTERRUPTED)


def by_signal(code: Any) -> Any:
    """The exit code of a command: outside of `errors`, typer takes SIGTERM for Ctrl-C."""
    return TERMINATED if code == INTERRUPTED and _signal == signal.SIGTERM else code


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Errors as words that say what to do, or as a JSON object, on stderr; and the exit code."""
    try:
        yield
    except MaskwireError as error:
        _fail(_for_command(str(error), error.reason), _code(error), error.reason, as_json)
    except OutputError as error:
        _fail(str(error), OUTPUT, "", as_json)
    except (ValueError, OSError) as error:
        lost = isinstance(error, UnicodeEncodeError) or getattr(error, "errno", None) in _NO_ROOM
        reason = DATA_IN_USE if isinstance(error, DataChangedError) else ""
        _fail(_for_command(str(error), reason), OUTPUT if lost else USAGE, "", as_json)
    except KeyboardInterrupt:
        raise interrupted() from None


def _for_command(words: str, reason: str) -> str:
    """An error's words with its cure as an option: the server and the package speak of calls."""
    for call, option in _CURES.get(reason, {}).items():
        words = words.replace(call, option)
    return words


def _code(error: MaskwireError) -> int:
    for kind, code in (
        (UnavailableError, UNAVAILABLE),
        (SessionError, SESSION),
        (HistoryError, HISTORY),
        (AccessError, ACCESS),
    ):
        if isinstance(error, kind):
            return code
    return REFUSED


def _fail(words: str, code: int, reason: str, as_json: bool) -> None:
    show_error(words, code, reason, as_json=as_json)
    raise typer.Exit(code)


def show_error(words: str, code: int, reason: str = "", *, as_json: bool) -> None:
    """An error on stderr, in words or as a JSON object."""
    if as_json:
        tell(json.dumps({"error": words, "reason": reason, "exit_code": code}))
    else:
        tell(f"maskwire: {words}")
