"""A metrics file: one JSON object per line, each with its run, lineage and step.

A job that is killed can leave a partial line. The next job that opens the file repairs it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place, Record, is_evaluation, same_step
from maskwire.nonfatal_output import LineFile
from maskwire.signatures import refuse_unknown_keywords

_BLOCK = 2**20  # bytes at the end of the file that are searched for the last step
_LONGEST_LINE = 4096  # bytes


@refuse_unknown_keywords
class JsonLines(Logger):
    """Appends a JSON object per step and evaluation to a file. Give each job a file of its own."""

    def __init__(self, path: str | Path) -> None:
        """Log to a file.

        path: The file; it is created, or continued if it is of the same run.
        """
        self.path: Path = Path(path)
        self._last: Record = {}
        self._file: LineFile | None = None

    @property
    def label(self) -> str:
        """The file's path."""
        return str(self.path)

    def open(self, place: Place) -> Place | None:
        """Repair the file and return the place of its last line.

        Raises ValueError if it contains something else.
        """
        emptied = ended = False
        if self.path.exists() and stat.S_ISREG(self.path.stat().st_mode):
            with self.path.open("r+b") as file:
                self._last, ended = _repair(file, self.path)
                emptied = not file.seek(0, os.SEEK_END)
        self._file = LineFile(self.path)
        if ended:
            self._file.write(b"\n")
        if emptied:  # a job that started with the run was stopped before its first line
            return Place(place.run_id, 1, 0)
        return _place(self._last)

    def write(self, record: Record) -> None:
        """Append a line. OSError if it cannot be written."""
        assert self._file is not None
        repeated = is_evaluation(record) and is_evaluation(self._last) and same_step(record, self._last)
        begins = (
            record.get("event") == "started"
            and not self._last
            and (record["lineage"], record["step"]) == (1, 0)
        )
        # A job that is stopped just after it wrote an evaluation repeats the evaluation. A file without a
        # "started" record starts with the run, so that record is left out at the beginning of the run.
        if not (repeated or begins):
            self._file.write(json.dumps(record).encode() + b"\n")
        self._last = record

    def flush(self) -> None:
        """Raise OSError if the file was deleted, moved or replaced. Nothing is buffered."""
        if self._file is not None:
            self._file.check()

    def close(self) -> None:
        """Close the file. OSError if the file system reports only now that a line was not written."""
        if self._file is not None:
            self._file.close()


def _place(line: Record) -> Place | None:
    """The position in the history that a line of the file belongs to; None if it has none."""
    if {"run_id", "lineage"} <= line.keys():
        return Place(str(line["run_id"]), int(line["lineage"]), int(line["step"]))
    step = int(line.get("step", 0))
    return Place("", 0, step, str(line["digest"])) if step else None  # of an older version


def _repair(file: IO[bytes], path: str | Path) -> tuple[dict[str, Any], bool]:
    """Remove a partial last line. A file that contains something else is left unchanged.

    Returns the last line with a step, or {}, and whether the last line lacks only its newline.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _BLOCK))
    whole, newline, torn = file.read().rpartition(b"\n")
    unended = bool(torn) and _object(torn) is not None
    if unended:
        whole += newline + torn
    lines = [line for line in whole.splitlines() if line.strip(b" \r\0")]
    if lines:
        _require("step" in (_object(lines[-1]) or {}), path, lines[-1])
    if torn and not unended:
        # A full disk or a power loss leaves the beginning of a line, or zeros. If the file has nothing else,
        # this must be the beginning of one of our lines, or zeros that are no longer than a line.
        ours = torn.startswith((b'{"run_id": ', b'{"step": ')) or b'{"run_id": '.startswith(torn)
        zeros = not torn.strip(b"\0")
        known = torn.startswith(b"{") or zeros if lines else ours or (zeros and size < _LONGEST_LINE)
        _require(known, path, torn)
        file.truncate(size - len(torn))
    for line in _objects(reversed(lines)):
        if "step" in line and ("run_id" in line or "digest" in line):
            return line, unended
    return {}, unended


def _objects(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    return (found for line in lines if (found := _object(line)) is not None)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _require(holds: bool, path: str | Path, line: bytes) -> None:
    if not holds:
        raise ValueError(f"{path} is not a metrics file: its last line is {line[:40]!r}; choose another file")
