"""Exit codes of the command `maskwire`, and the functions that report its errors."""

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
from maskwire.data.file_array import DataChangedError
from maskwire.errors import (
    AccessError,
    HistoryError,
    MaskwireError,
    SessionError,
    UnavailableError,
)
from maskwire.nonfatal_output import tell
from maskwire.standard_streams import OUTPUT

REFUSED, USAGE, UNAVAILABLE, SESSION, HISTORY, ACCESS = 1, 2, 3, 4, 5, 6
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM

CODES = {
    0: "success, also if the reader of the output closes it early",
    REFUSED: "refused: the server rejected the request or one of its values, such as a checkpoint's name or "
    "--draws, and nothing changed; or the server is not healthy",
    USAGE: "wrong usage: an option, a path or data that cannot be used",
    UNAVAILABLE: "no answer from the server within --retry-for",
    SESSION: "session lost or refused: another writer has the run or took it over, or the run was restored",
    HISTORY: "history mismatch: server and client disagree on what was trained; check the server's storage",
    ACCESS: "access denied: TLS or token rejected",
    OUTPUT: "output lost: the result, `--metrics`, `--log` or another file could not be written, as on a "
    "full disk; what was trained is safe",
    INTERRUPTED: "interrupted by Ctrl-C; the same command resumes",
    TERMINATED: "terminated by SIGTERM; the same command resumes",
}

RETRYABLE = frozenset({UNAVAILABLE, INTERRUPTED, TERMINATED})
"""The codes after which the same command may succeed without a change; after others, someone must act."""

DATA_IN_USE = "DATA_IN_USE"  # only in this module: DataChangedError has no reason
_REMEDIES = {
    "DATA_CHANGED": {
        "allow_changed_data": "--allow-changed-data",
        "train on the data split with held_out=": "repeat --eval-every and --held-out ",
        "train on the data without a split": "leave out --eval-every, or give --eval-data too",
    },
    DATA_IN_USE: {
        "or open the data again": "or run the command again; `maskwire train` then needs --allow-changed-data"
    },
    "TOKENIZER_MISMATCH": {
        "prepare the data with the run's tokenizer": "download the run's tokenizer (maskwire data tokenizer "
        "--out TOKENIZER) and prepare the data with it (maskwire data prepare PATH --tokenizer TOKENIZER "
        "--out FOLDER); for a run of bytes give the texts themselves",
        "prepare the data with the training data's tokenizer": "prepare the data with the training data's "
        "tokenizer (maskwire data prepare PATH --tokenizer TRAINING/tokenizer.json --out FOLDER); for bytes "
        "give the texts themselves",
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
"""By reason: the remedy for Python code that a message contains, and the one for the command line."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_signal: int | None = None  # the signal that interrupted the command


def handle_signals() -> None:
    """Handle SIGTERM like Ctrl-C: the first signal ends the command cleanly, a second one ends it at once."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        global _signal
        if _signal is not None:
            os._exit(128 + number)  # acknowledged steps are durable
        _signal = number
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def interrupted() -> typer.Exit:
    """The exception that ends an interrupted command with the exit code of the signal."""
    return typer.Exit(TERMINATED if _signal == signal.SIGTERM else INTERRUPTED)


def correct_exit_code(code: Any) -> Any:
    """Return the exit code, corrected after SIGTERM: outside `errors`, typer returns the code of Ctrl-C."""
    return TERMINATED if code == INTERRUPTED and _signal == signal.SIGTERM else code


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Report an error of the `with` block on stderr, as text or as JSON, and exit with the matching code."""
    try:
        yield
    except MaskwireError as error:
        _fail(_for_command(str(error), error.reason), _code(error), error.reason, as_json)
    except OutputError as error:
        _fail(str(error), OUTPUT, "", as_json)
    except (ValueError, OSError, ImportError) as error:
        lost = isinstance(error, UnicodeEncodeError) or getattr(error, "errno", None) in _NO_ROOM
        reason = DATA_IN_USE if isinstance(error, DataChangedError) else ""
        _fail(_for_command(str(error), reason), OUTPUT if lost else USAGE, "", as_json)
    except KeyboardInterrupt:
        raise interrupted() from None


def _for_command(words: str, reason: str) -> str:
    """Replace the remedies for Python code in a message by those for the command line."""
    for call, option in _REMEDIES.get(reason, {}).items():
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
    """Print an error on stderr, as text or as a JSON object."""
    if as_json:
        found = {"error": words, "reason": reason, "exit_code": code, "retryable": code in RETRYABLE}
        tell(json.dumps(found))
    else:
        tell(f"maskwire: {words}")
