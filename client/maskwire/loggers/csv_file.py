"""Logger that writes a CSV file: a header, then one row per step and per evaluation."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place, Record, is_evaluation, same_step
from maskwire.nonfatal_output import LineFile
from maskwire.signatures import refuse_unknown_keywords

COLUMNS = (
    "run_id", "lineage", "step", "event", "loss", "generator_loss", "critic_loss", "gradient_norm",
    "learning_rate", "compute_seconds", "tokens", "outcome", "digest", "time", "filled_in",
    "eval_bits_per_token", "eval_standard_error_bits", "parent_lineage", "checkpoint",
)  # fmt: skip
"""The fields of all kinds of records. A cell is empty if the record has no such field or no number there."""

_BLOCK = 2**20  # bytes at the end of the file that are searched for the last row


@refuse_unknown_keywords
class CsvFile(Logger):
    """Logger that appends one row per step and per evaluation to a CSV file. Give each job its own file."""

    def __init__(self, path: str | Path) -> None:
        """Log to a CSV file.

        path: The file. It is created if it does not exist; otherwise rows are appended to it.
        """
        self.path: Path = Path(path)
        self._last: Record = {}
        self._begun = False
        self._file: LineFile | None = None

    @property
    def label(self) -> str:
        """The file's path, which names this log in messages."""
        return str(self.path)

    def open(self, place: Place) -> Place | None:  # noqa: ARG002
        """Open the file, remove a partial last row, and return the place of the last complete row.

        Returns None if the file has no rows. Raises ValueError if another program wrote the file.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size and self.path.is_file():
            size = self._repair(size)
        self._file = LineFile(self.path)
        self._begun = size > 0
        if not self._last:
            return None
        return Place(self._last["run_id"], int(self._last["lineage"]), int(self._last["step"]))

    def write(self, record: Record) -> None:
        """Append a row. Raises OSError if the row cannot be written."""
        assert self._file is not None
        # A job that is stopped just after it wrote an evaluation repeats the evaluation.
        if not (is_evaluation(record) and is_evaluation(self._last) and same_step(record, self._last)):
            header = b"" if self._begun else _line(COLUMNS)
            self._file.write(header + _line([_cell(record.get(name)) for name in COLUMNS]))
            self._begun = True
        self._last = record

    def flush(self) -> None:
        """Raise OSError if the file was deleted, moved or replaced. There is no buffer to flush."""
        if self._file is not None:
            self._file.check()

    def close(self) -> None:
        """Close the file. Raises OSError if the file system reports only now that a row was not written."""
        if self._file is not None:
            self._file.close()

    def _repair(self, size: int) -> int:
        """Remove a partial last row, read the last complete row, and return the file's new size in bytes."""
        header = _line(COLUMNS)
        with self.path.open("r+b") as file:
            if not header.startswith(head := file.read(len(header))):
                raise ValueError(
                    f"{self.path} is not a metrics file: it begins with {head[:40]!r}; choose another file"
                )
            file.seek(max(0, size - _BLOCK))
            whole, newline, torn = file.read().rpartition(b"\n")
            size -= len(torn)
            if torn:
                file.truncate(size)
        if size > len(header):
            row = (whole + newline).splitlines()[-1].decode()
            values = dict(zip(COLUMNS, next(csv.reader([row])), strict=False))
            self._last = {name: value for name, value in values.items() if value}
        return size


def _line(cells: tuple[str, ...] | list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
