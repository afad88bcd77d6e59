"""Readers of files with records: JSON Lines, CSV, Parquet and Arrow.

A reader takes a source's open function, the fields, and the place to start at. It yields an Item per record,
and holds one part of the file in memory at a time: a line, or a batch of rows.

Some errors concern one record, and its Item says so: a line that is not a JSON object with the fields, a row
of CSV with too few or too many fields, a value that is not text or not UTF-8. All others are raised, because
it is not known where the next record begins.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from maskwire.data.record import NOT_UNICODE, Fields, Item

Open = Callable[[], IO[bytes]]
Reader = Callable[[str, Open, Fields, int], Iterator[Item]]

_ROWS = 1024  # read at once from a columnar file
_LONGEST_FIELD = 2**30  # of a CSV file, in characters
_NEEDS_ARROW = 'needs the package `pyarrow`: pip install "maskwire[data]", or save the texts as JSON Lines'


def read_json_lines(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """One JSON object per line; `start` is a byte offset. Empty lines are skipped."""
    with opened() as file:
        file.seek(start)
        place, before = start, 0
        after = f" after byte {start:,}" if start else ""
        for number, line in enumerate(file, 1):
            place += len(line)
            if not line.strip():
                continue
            try:
                yield _from_line(f"{name}, line {number:,}{after}", line, fields, place)
            except ValueError as error:
                before = before or _line_number(opened, start)
                yield Item.invalid(f"{name}, line {before + number - 1:,}: {error}", place, place)


def _from_line(name: str, line: bytes, fields: Fields, place: int) -> Item:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); JSON Lines has one object per line") from None
    if not isinstance(found, dict):
        raise ValueError(f"it must be a JSON object with fields, got {type(found).__name__}")
    values = []
    for field in fields.names:
        if field not in found:
            raise fields.missing(list(found))
        values.append(found[field])
    return fields.item(name, values, place, place)


def _line_number(opened: Open, offset: int) -> int:
    """The number of the line that starts at an offset."""
    number, left = 1, offset
    with opened() as file:
        while left and (part := file.read(min(left, 2**20))):
            number, left = number + part.count(b"\n"), left - len(part)
    return number


def read_csv(name: str, opened: Open, fields: Fields, start: int, delimiter: str = ",") -> Iterator[Item]:
    """A header, then one record per row; `start` is a number of rows."""
    csv.field_size_limit(_LONGEST_FIELD)
    with (
        opened() as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        number = 0
        try:
            header = next(rows, [])
            "".join(header).encode()
            if any(field not in header for field in fields.names):
                raise ValueError(f"{name}: {fields.missing(header)}")
            columns = [header.index(field) for field in fields.names]
            for number, row in enumerate(rows, 1):
                if number <= start or not row:
                    continue
                where = f"{name}, row {number:,}"
                if len(row) != len(header):
                    error = f"{where}: it has {len(row)} fields, but the header has {len(header)}"
                    yield Item.invalid(error, number, _tell(file))
                    continue
                item = fields.item(where, [row[column] for column in columns], number, _tell(file))
                wrong = item.dropped == NOT_UNICODE  # by "surrogateescape"
                yield Item.invalid(f"{where}: not UTF-8", number, item.done) if wrong else item
        except UnicodeEncodeError:
            raise ValueError(f"{name}: its header is not UTF-8; convert the file") from None
        except csv.Error as error:
            raise ValueError(f"{name}, after row {number:,}: cannot be read as CSV: {error}") from None


def read_tsv(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """As `read_csv`, with tabs between the fields."""
    return read_csv(name, opened, fields, start, "\t")


def _tell(file: IO[bytes]) -> int:
    """How much of a file has been read, which runs ahead of the rows; for progress. 0 if unknown."""
    try:
        return file.tell()
    except OSError:
        return 0


def read_parquet(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """The rows of a Parquet file; `start` is a number of rows. Row groups before it are not read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{name}: a Parquet file {_NEEDS_ARROW}") from None
    with opened() as file:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{name}: cannot be read as Parquet: {error}") from None
        if any(field not in columns for field in fields.names):
            raise ValueError(f"{name}: {fields.missing(columns)}")
        groups = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        total, first = max(1, sum(groups)), 0
        size = file.seek(0, io.SEEK_END)
        wanted: list[int] = []
        for index, rows in enumerate(groups):
            if wanted or first + rows > start:
                wanted.append(index)
            else:
                first += rows
        if wanted:
            batches = table.iter_batches(_ROWS, row_groups=wanted, columns=fields.names)
            yield from _rows(name, batches, fields, start, first, lambda row: size * row // total)


def read_arrow(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """The rows of an Arrow file, of the IPC file or stream format; `start` is a number of rows."""
    try:
        from pyarrow import ArrowException, ipc
    except ImportError:
        raise ValueError(f"{name}: an Arrow file {_NEEDS_ARROW}") from None
    with opened() as file:
        is_file = file.read(6) == b"ARROW1"
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            table = ipc.open_file(file) if is_file else ipc.open_stream(file)
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{name}: cannot be read as Arrow: {error}") from None
        columns = table.schema.names
        if any(field not in columns for field in fields.names):
            raise ValueError(f"{name}: {fields.missing(columns)}")
        batches: Iterator[Any] = (
            (table.get_batch(index) for index in range(table.num_record_batches)) if is_file else iter(table)
        )
        yield from _rows(name, batches, fields, start, 0, lambda _: min(size, _tell(file)))


def _rows(
    name: str,
    batches: Iterator[Any],
    fields: Fields,
    start: int,
    first: int,
    done: Callable[[int], int],
) -> Iterator[Item]:
    """The rows of record batches from row `start` onwards; the first batch begins with row `first`."""
    for batch in batches:
        skipped = min(max(0, start - first), batch.num_rows)
        for offset in range(skipped, batch.num_rows, _ROWS):
            part = batch.slice(offset, _ROWS)
            columns = [_values(part.column(field)) for field in fields.names]
            for row, values in enumerate(zip(*columns, strict=True), first + offset + 1):
                where = f"{name}, row {row:,}"
                try:
                    yield fields.item(where, list(values), row, done(row))
                except ValueError as error:
                    yield Item.invalid(f"{where}: {error}", row, done(row))
        first += batch.num_rows


def _values(column: Any) -> list[Any]:
    """The values of a column, with the error in place of a value that is not UTF-8."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        found = []
        for value in column:
            try:
                found.append(value.as_py())
            except UnicodeDecodeError as error:
                found.append(error)
    return found


_READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_WITH_FIELDS: dict[str, Reader] = {".json": read_json_lines, ".csv": read_csv, ".tsv": read_tsv}
"""Types of text files that are read as records only if a field is named."""


def reader_of(name: str, fields: Fields) -> Reader | None:
    """The reader of a file with this name; None for a file that is read as one text."""
    suffix = PurePosixPath(name).suffix.lower()
    return _READERS.get(suffix) or (_WITH_FIELDS.get(suffix) if fields.given else None)
