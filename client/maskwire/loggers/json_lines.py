"""Logger that writes a metrics file: one JSON object per line, each with its run, lineage and step.

A job that is killed can leave a partial line. The next job that opens the file repairs that line.
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
    """Logger that appends one JSON line per step and per evaluation to a file. Give each job its own file."""

    def __init__(self, path: str | Path) -> None:
        """Log to a file of JSON lines.

        path: The file. It is created if it does not exist; otherwise lines are appended to it.
        """
        self.path: Path = Path(path)
        self._last: Record = {}
        self._file: LineFile | None = None

    @property
    def label(self) -> str:
        """The file's path, which names this log in messages."""
        return str(self.path)

    def open(self, place: Place) -> Place | None:
        """Open the file, repair a partial last line, and return the lineage and step of its last line.

        Returns None if the file has no lines. Raises ValueError if another program wrote the file.
        """
        emptied = ended = False
        if self.path.exists() and stat.S_ISREG(self.path.stat().st_mode):
            with self.path.open("r+b") as file:
                self._last, ended = _repair(file, self.path)
                emptied = not file.seek(0, os.SEEK_END)
        self._file = LineFile(self.path)
        if ended:
            self._file.write(b"\n")
        if emptied:  # the job that started the run was stopped before it wrote a complete line
            return Place(place.run_id, 1, 0)
        return _place(self._last)

    def write(self, record: Record) -> None:
        """Append a line. Raises OSError if the line cannot be written."""
        assert self._file is not None
        repeated = is_evaluation(record) and is_evaluation(self._last) and same_step(record, self._last)
        begins = (
            record.get("event") == "started"
            and not self._last
            and (record["lineage"], record["step"]) == (1, 0)
        )
        # A job that is stopped just after it wrote an evaluation repeats the evaluation. A file without a
        # "started" record starts with the run, so a file that starts with the run needs no such record.
        if not (repeated or begins):
            self._file.write(json.dumps(record).encode() + b"\n")
        self._last = record

    def flush(self) -> None:
        """Raise OSError if the file was deleted, moved or replaced. There is no buffer to flush."""
        if self._file is not None:
            self._file.check()

    def close(self) -> None:
        """Close the file. Raises OSError if the file system reports only now that a line was not written."""
        if self._file is not None:
            self._file.close()


def _place(line: Record) -> Place | None:
    """Return the place in the run's history that a line of the file records; None if it records none."""
    if {"run_id", "lineage"} <= line.keys():
        return Place(str(line["run_id"]), int(line["lineage"]), int(line["step"]))
    step = int(line.get("step", 0))
    return Place("", 0, step, str(line["digest"])) if step else None  # a line of an older version


def _repair(file: IO[bytes], path: str | Path) -> tuple[dict[str, Any], bool]:
    """Remove a partial last line from a metrics file, and read the last line that records a step.

    Returns that line, or {} if there is none, and whether the last line lacks only its newline. Raises
    ValueError for a file that is not a metrics file, and leaves it unchanged.
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
        # A full disk or a power loss leaves the beginning of a line, or zero bytes. If the file has nothing
        # else, these bytes must be the beginning of one of our lines, or zeros no longer than a line.
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
