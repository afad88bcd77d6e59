"""Records the data of a training loop with the run, and explains the error for data that has changed."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from maskwire.errors import DataMismatchError
from maskwire.protocol.data_tokenizer import keep_tokenizer
from maskwire.protocol.effects import Work
from maskwire.protocol.fit_actions import Fitting

_FILES_SHOWN = 3  # in an error message


def record_data(trainer: Any, data: Any, allow_changed: bool) -> Fitting[None]:
    """Record the data's tokenizer and fingerprint with the run.

    Raises DataMismatchError if the run was trained on other data, unless `allow_changed` is True.
    """
    if getattr(data, "tokenizer", ""):
        yield partial(trainer.use_tokenizer, data.tokenizer)
        yield from keep_tokenizer(trainer, data)
    if hasattr(data, "fingerprint"):
        fingerprint = yield Work(data.fingerprint)
        try:
            yield partial(trainer.use_data, fingerprint, allow_changed=allow_changed)
        except DataMismatchError as error:
            raise _with_cause(error, trainer.data, fingerprint, files_of(data)) from None


def files_of(data: Any) -> list[Path]:
    """Return the files that the data was read from; empty if the data has no attribute `files`."""
    files: list[Path] = getattr(data, "files", [])
    return files


def _with_cause(
    error: DataMismatchError, recorded: dict[str, str], given: dict[str, str], files: list[Path]
) -> DataMismatchError:
    """Return the error with its probable cause: another split of the data, or the files written last.

    The run records a hash of the data but no file names, so the files that changed are not known.
    """
    changed = error.metadata.get("changed", "").split(",")
    if "held_out" in changed:
        share = recorded.get("held_out")
        cure = f"the data split with held_out={share}" if share else "the data without a split"
        text = str(error)
        return type(error)(
            f"held_out was {share or 'not set'} and is {given.get('held_out', 'not set')}: train on {cure}. "
            f"{text[:1].upper()}{text[1:]}",
            reason=error.reason,
            metadata=error.metadata,
        )
    if "content" not in changed:
        return error
    times = {path: path.stat().st_mtime for path in files if path.exists()}
    newest = sorted(times, key=lambda path: times[path], reverse=True)[:_FILES_SHOWN]
    if not newest:
        return error
    shown = ", ".join(
        f"{path} ({datetime.fromtimestamp(times[path], UTC):%Y-%m-%d %H:%M:%S} UTC)" for path in newest
    )
    return type(error)(
        f"{error}. The data now consists of {len(files)} files, of which these were written last: {shown}. "
        "If one of them is not data, move it away, or exclude it with a pattern (--pattern)",
        reason=error.reason,
        metadata=error.metadata,
    )
