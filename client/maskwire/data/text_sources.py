"""Where texts come from: files and folders, remote addresses, and Hugging Face data sets.

A source yields Items from any position, so that a preparation can resume where it was stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from maskwire.data import hugging_face, remote_files
from maskwire.data.file_discovery import find_files
from maskwire.data.record import EMPTY, Fields, Item, Record
from maskwire.data.record_files import Reader, reader_of

Paths = Any
"""A path or address, several of them, or a Hugging Face data set."""


class Source(Protocol):
    """Texts in a fixed order."""

    name: str
    size: int
    """In bytes, for progress; 0 if unknown."""
    identity: str
    """Changes when the source changes."""

    def read(self, start: int) -> Iterator[Item]:
        """Yield the items from position `start` onwards: 0, or the `place` of an earlier Item."""


class TextFile:
    """A local file whose bytes are one text."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        found = path.stat()
        self.size = found.st_size
        self.identity = f"{path.absolute()} {found.st_size} {found.st_mtime_ns}"

    def read(self, start: int) -> Iterator[Item]:
        """Yield the text, unless `start` says that it was read."""
        if start == 0:
            yield Item(Record(self.name, self._path), "", 1, self.size)


class RecordFile:
    """A local file with one text per record."""

    def __init__(self, path: Path, reader: Reader, fields: Fields) -> None:
        self.name, self._path, self._reader, self._fields = str(path), path, reader, fields
        found = path.stat()
        self.size = found.st_size
        self.identity = f"{path.absolute()} {found.st_size} {found.st_mtime_ns}"

    def _open(self) -> IO[bytes]:
        return self._path.open("rb")

    def read(self, start: int) -> Iterator[Item]:
        """Yield the records from `start` onwards, which is 0 or the `place` of an earlier Item."""
        return self._reader(self.name, self._open, self._fields, start)


class RemoteFile:
    """A file at an fsspec address: one text, or one text per record."""

    def __init__(self, file: remote_files.Remote, fields: Fields) -> None:
        self.name, self.size, self.identity = file.address, file.size, file.identity
        self._file, self._fields = file, fields
        self._reader = reader_of(file.address, fields)

    def read(self, start: int) -> Iterator[Item]:
        """Yield the text, or the records from `start` onwards: 0, or the `place` of an earlier Item."""
        if self._reader is not None:
            yield from self._reader(self.name, self._file.open, self._fields, start)
        elif start == 0:
            with self._file.open() as opened:
                text = opened.read()
            yield Item(Record(self.name, text) if text else None, "" if text else EMPTY, 1, len(text))


def find_sources(
    paths: Paths, fields: Fields, *, pattern: str = "*", any_format: bool = False
) -> list[Source]:
    """The sources that paths, addresses and data sets name; local files are last, ordered as in `ByteData`.

    If a field is named, local files without fields are left out.
    Raises ValueError for a source that cannot be read.
    """
    if any_format and fields.given:
        raise ValueError(
            "any_format (--any-format) reads files as bytes, without fields; leave out the names of fields"
        )
    given = [paths] if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else paths
    if hugging_face.is_dataset(paths):
        given = [paths]
    found: list[Source] = []
    local: list[Path] = []
    for each in given:
        if hugging_face.is_dataset(each):
            found.append(hugging_face.DatasetSource(each, fields))
        elif remote_files.is_remote(each):
            found += [RemoteFile(file, fields) for file in remote_files.find(str(each), pattern)]
        elif hugging_face.is_dataset_folder(Path(each)):
            found.append(hugging_face.DatasetSource(hugging_face.load(Path(each)), fields))
        else:
            local.append(Path(each))
    if local:
        readable = None if any_format else partial(reader_of, fields=fields)
        for path in find_files(
            local, pattern, any_format=any_format, is_records=readable, only_records=fields.given
        ):
            reader = readable(str(path)) if readable else None
            found.append(RecordFile(path, reader, fields) if reader else TextFile(path))
    if not found:
        raise ValueError("there is no data: give a path, an address or a data set")
    return found


def identity_of(sources: list[Source]) -> str:
    """A hash that changes when the sources do."""
    identities = "\n".join(source.identity for source in sources)
    return hashlib.sha256(identities.encode(errors="surrogateescape")).hexdigest()  # names of any encoding
