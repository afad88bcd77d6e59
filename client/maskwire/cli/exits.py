"""How the command ends: its exit codes, and errors as people and programs can read them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from maskwire.errors import (
    AccessError,
    HistoryError,
    MaskwireError,
    SessionError,
    UnavailableError,
)

REFUSED, USAGE, UNAVAILABLE, SESSION, HISTORY, ACCESS = 1, 2, 3, 4, 5, 6
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM

CODES = {
    0: "done",
    REFUSED: "refused: the message says why, nothing changed; or the server is not healthy",
    USAGE: "wrong usage: an option, a path or data that cannot be used",
    UNAVAILABLE: "no answer from the server within --retry-for",
    SESSION: "another writer has the run, or took it over",
    HISTORY: "server and client disagree about what was trained: look at the server's storage",
    ACCESS: "the door stays shut: a certificate or a token does not fit",
    INTERRUPTED: "interrupted by Ctrl-C; the same command goes on",
    TERMINATED: "ended by SIGTERM; the same command goes on",
}

_console = Console(stderr=True, highlight=False)
_terminated = False


def on_sigterm() -> None:
    """Make SIGTERM end the command as Ctrl-C does; a second signal leaves at once."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        global _terminated
        _terminated = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)


def interrupted() -> typer.Exit:
    """The end of a command that a signal broke off."""
    return typer.Exit(TERMINATED if _terminated else INTERRUPTED)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Errors as words that say what to do, or as a JSON object, on stderr; and the exit code."""
    try:
        yield
    except MaskwireError as error:
        words, code = str(error), _code(error)
        if isinstance(error, UnavailableError) and "is the server running" not in words:
            words += "\nis the server running, and the address right?"
        _fail(words, code, error.reason, as_json)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error), USAGE, "", as_json)
    except KeyboardInterrupt:
        raise interrupted() from None


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
    if as_json:
        typer.echo(json.dumps({"error": words, "reason": reason, "exit_code": code}), err=True)
    else:
        say(f"maskwire: {words}")
    raise typer.Exit(code)


def say(text: str) -> None:
    """A line on stderr."""
    _console.print(text, markup=False, soft_wrap=True)
