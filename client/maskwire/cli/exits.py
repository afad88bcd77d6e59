"""How the command ends: its exit codes, and errors as people and programs can read them."""

from __future__ import annotations

import json
import os
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
    SESSION: "the run is not as expected: another writer has it or took it over, or it was restored",
    HISTORY: "server and client disagree about what was trained: look at the server's storage",
    ACCESS: "the door stays shut: a certificate or a token does not fit",
    INTERRUPTED: "interrupted by Ctrl-C; the same command goes on",
    TERMINATED: "ended by SIGTERM; the same command goes on",
}

_console = Console(stderr=True, highlight=False)
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


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Errors as words that say what to do, or as a JSON object, on stderr; and the exit code."""
    try:
        yield
    except MaskwireError as error:
        _fail(str(error), _code(error), error.reason, as_json)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(0) from None
    except (ValueError, OSError) as error:
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
