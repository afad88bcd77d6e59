"""Readers of files with records: JSON Lines, CSV, Parquet and Arrow.

A reader takes a source's open function, the fields, and the place to start at. It yields an Item per record,
and holds one part of the file in memory at a time: a line, or a batch of rows.

An error that concerns one record is reported in its Item: a line that is not a JSON object with the fields, a
row of CSV with too few or too many fields, a value that is not text or not UTF-8. All other errors are
raised, because it is not known where the next record begins.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

from maskwire.data.record import NOT_UNICODE, Fields, Item

Open = Callable[[], IO[bytes]]
Reader = Callable[[str, Open, Fields, int], Iterator[Item]]

_ROWS = 1024  # read at once from a columnar file
_BUFFER = 2**20  # bytes read at once from a column of a Parquet file
_LONGEST_FIELD = 2**30  # of a CSV file, in characters
_NOT_UTF_8 = "not UTF-8; convert it to UTF-8"
_NEEDS_ARROW = 'needs the package `pyarrow`: pip install "maskwire[data]", or save the texts as JSON Lines'


def read_json_lines(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """Yield an Item for each line of JSON Lines from byte offset `start` onwards; skip empty lines."""
    with opened() as file:
        file.seek(start)
        place, before = start, 0
        after = f" after byte {start:,}" if start else ""
        for number, line in enumerate(file, 1):
            place += len(line)
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            try:
                yield _from_line(f"{name}, line {number:,}{after}", line, fields, place)
            except ValueError as error:
                before = before or _line_number(opened, start)
                yield Item.invalid(f"{name}, line {before + number - 1:,}: {error}", place, place)


def _from_line(name: str, line: bytes, fields: Fields, place: int) -> Item:
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 ({error}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the line is not valid JSON ({error}); JSON Lines has one object per line"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"the line must be a JSON object with fields, got {type(found).__name__}")
    values = []
    for field in fields.names:
        if field not in found:
            raise fields.missing(list(found))
        values.append(found[field])
    return fields.item(name, values, place, place)


def _line_number(opened: Open, offset: int) -> int:
    """The number of the line that starts at a byte offset. The first line has the number 1."""
    number, left = 1, offset
    with opened() as file:
        while left and (part := file.read(min(left, 2**20))):
            number, left = number + part.count(b"\n"), left - len(part)
    return number


def read_csv(name: str, opened: Open, fields: Fields, start: int, delimiter: str = ",") -> Iterator[Item]:
    """Yield an Item for each row of a CSV file with a header, after the first `start` rows."""
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
            _check_columns(name, header, fields)
            columns = [header.index(field) for field in fields.names]
            for number, row in enumerate(rows, 1):
                if number <= start or not row:
                    continue
                where = f"{name}, row {number:,}"
                if len(row) != len(header):
                    error = f"{where}: the row has {len(row)} fields, but the header has {len(header)}"
                    yield Item.invalid(error, number, _tell(file))
                    continue
                item = fields.item(where, [row[column] for column in columns], number, _tell(file))
                wrong = item.dropped == NOT_UNICODE  # by "surrogateescape"
                yield Item.invalid(f"{where}: {_NOT_UTF_8}", number, item.done) if wrong else item
        except UnicodeEncodeError:
            raise ValueError(f"{name}: the header is not UTF-8; convert the file to UTF-8") from None
        except csv.Error as error:
            raise ValueError(
                f"{name}, after row {number:,}: cannot be read as CSV: {error}; correct the row that follows"
            ) from None


def _check_columns(name: str, columns: list[str], fields: Fields) -> None:
    if any(field not in columns for field in fields.names):
        raise ValueError(f"{name}: {fields.missing(columns)}")
    for field in fields.names:
        if (count := columns.count(field)) > 1:
            raise ValueError(f"{name}: {count} columns are named {field!r}; rename all but one")


def read_tsv(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """Yield an Item for each row of a TSV file: as `read_csv`, but with tabs between the fields."""
    return read_csv(name, opened, fields, start, "\t")


def _tell(file: IO[bytes]) -> int:
    """How many bytes of a file have been read, for the progress bar; 0 if unknown. Reading is buffered."""
    try:
        return file.tell()
    except OSError:
        return 0


def read_parquet(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """Yield an Item for each row of a Parquet file after the first `start` rows.

    Row groups that lie before these rows are not read.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{name}: a Parquet file {_NEEDS_ARROW}") from None
    with opened() as file:
        with _damage_named(name, "Parquet"):
            # Pages of a column are read one after another: a row group is not held in memory.
            table = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
            columns = table.schema_arrow.names
            size = file.seek(0, io.SEEK_END)
        _check_columns(name, columns, fields)
        groups = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        total, first = max(1, sum(groups)), 0
        wanted: list[int] = []
        for index, rows in enumerate(groups):
            if wanted or first + rows > start:
                wanted.append(index)
            else:
                first += rows
        if wanted:
            batches = table.iter_batches(_ROWS, row_groups=wanted, columns=fields.names)
            values = _values(name, "Parquet", batches, fields, start, first)
            yield from _items(name, values, fields, lambda row: size * row // total)


def read_arrow(name: str, opened: Open, fields: Fields, start: int) -> Iterator[Item]:
    """Yield an Item for each row of an Arrow file after the first `start` rows.

    The file has the IPC file format or the IPC stream format.
    """
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{name}: an Arrow file {_NEEDS_ARROW}") from None
    with ExitStack() as stack:
        file: Any = stack.enter_context(opened())
        # A local file is memory-mapped, so that its batches take no memory.
        if isinstance(getattr(file, "raw", None), io.FileIO):
            file = stack.enter_context(pyarrow.memory_map(file.name))
        begins = file.read(6)
        if begins.startswith(b"FEA1"):
            raise ValueError(
                f"{name}: Feather version 1 cannot be read; write it again with pyarrow.feather.write_feather"
            )
        with _damage_named(name, "Arrow"):
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            is_file = begins == b"ARROW1"
            table = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        _check_columns(name, table.schema.names, fields)
        done = 0

        def batches() -> Iterator[Any]:
            nonlocal done
            if not is_file:
                yield from table
            for index in range(table.num_record_batches if is_file else 0):
                done = size * index // table.num_record_batches
                yield table.get_batch(index)

        values = _values(name, "Arrow", batches(), fields, start, 0)
        yield from _items(name, values, fields, lambda _: done if is_file else min(size, _tell(file)))


@contextmanager
def _damage_named(name: str, format_: str) -> Iterator[None]:
    """Convert errors of pyarrow, which have many types, to a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(name):  # the error of a remote file, which has its name already
            raise
        raise ValueError(
            f"{name}: cannot be read as {format_}: {error or type(error).__name__}; if the file is damaged "
            "or truncated, copy or write it again"
        ) from None


def _values(
    name: str, format_: str, batches: Iterator[Any], fields: Fields, start: int, first: int
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number and values of each row after the first `start`; `first` rows precede the batches."""
    with _damage_named(name, format_):
        for batch in batches:
            skipped = min(max(0, start - first), batch.num_rows)
            for offset in range(skipped, batch.num_rows, _ROWS):
                columns = [batch.slice(offset, _ROWS).column(field) for field in fields.names]
                for column in columns:
                    _check_offsets(column)
                rows = zip(*map(_column_values, columns), strict=True)
                for number, values in enumerate(rows, first + offset + 1):
                    yield number, list(values)
            first += batch.num_rows


def _items(
    name: str, rows: Iterator[tuple[int, list[Any]]], fields: Fields, done: Callable[[int], int]
) -> Iterator[Item]:
    for number, values in rows:
        where = f"{name}, row {number:,}"
        try:
            yield fields.item(where, values, number, done(number))
        except ValueError as error:
            yield Item.invalid(f"{where}: {error}", number, done(number))


def _check_offsets(column: Any) -> None:
    """Raise an error for damaged offsets, with which pyarrow would read memory outside the column.

    Strings are checked as bytes, because a text that is not UTF-8 is reported later, with its row.
    """
    from pyarrow import binary, large_binary, types

    if types.is_string(column.type):
        column = column.view(binary())
    elif types.is_large_string(column.type):
        column = column.view(large_binary())
    column.validate(full=True)


def _column_values(column: Any) -> list[Any]:
    """The values of a column, with the UnicodeDecodeError in place of each value that is not UTF-8."""
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
TABULAR: dict[str, Reader] = {".json": read_json_lines, ".csv": read_csv, ".tsv": read_tsv}
"""Types of text files that are read as records only if a field is named."""
TEXT_RECORDS = (".jsonl", ".ndjson", *TABULAR)
"""Types of files with records that are text files."""


def reader_of(name: str, fields: Fields) -> Reader | None:
    """Return the reader for files with this name; None if such files are read as one text."""
    suffix = PurePosixPath(name).suffix.lower()
    return _READERS.get(suffix) or (TABULAR.get(suffix) if fields.given else None)
