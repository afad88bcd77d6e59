"""Where texts come from: files and folders, remote addresses, and Hugging Face data sets.

A source yields Items from any position, so that a preparation can resume where it was stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from maskwire.data import hugging_face, remote_files
from maskwire.data.file_discovery import LocalFile, Skipped, expand, select
from maskwire.data.hugging_face import DatasetSource, is_dataset, is_dataset_folder
from maskwire.data.record import EMPTY, Fields, Item, Record
from maskwire.data.record_files import Reader, reader_of
from maskwire.data.remote_files import Remote, is_remote

log = logging.getLogger(__name__)

Paths = Any
"""A path or address, several of them, or a Hugging Face data set."""


class Source(Protocol):
    """A source of texts, which it yields in a fixed order."""

    name: str
    size: int
    """In bytes, for progress; 0 if unknown."""
    identity: str
    """Changes when the source changes."""

    def read(self, start: int) -> Iterator[Item]:
        """Yield the items from position `start` onwards, which is 0 or the `place` of an earlier Item."""


class FileSource:
    """A source that is a local or remote file, with one text or with one text per record."""

    def __init__(self, file: LocalFile | Remote, reader: Reader | None, fields: Fields) -> None:
        self.name, self.size, self.identity = file.name, file.size, file.identity
        self._file, self._reader, self._fields = file, reader, fields

    @property
    def text_path(self) -> Path | None:
        """The path of a local file whose bytes are one text; None for any other file."""
        return self._file.path if isinstance(self._file, LocalFile) and self._reader is None else None

    def read(self, start: int) -> Iterator[Item]:
        """Yield the items from position `start` onwards, which is 0 or the `place` of an earlier Item."""
        if self._reader is not None:
            items = self._reader(self.name, self._file.open, self._fields, start)
            if (first := next(items, None)) is not None:
                yield first
                yield from items
            elif start == 0:
                log.warning("%s: no records", self.name)
        elif start == 0:
            text: bytes | Path
            if self.text_path is not None:
                text = self.text_path
            else:
                with self._file.open() as opened:
                    text = opened.read()
            yield Item(Record(self.name, text) if text else None, "" if text else EMPTY, 1, self.size)


def find_sources(
    paths: Paths, fields: Fields, *, pattern: str = "*", any_format: bool = False
) -> list[Source]:
    """Return the sources for paths, addresses and data sets. Local files come last, sorted by path.

    If a field is named, files without fields are left out. Raises ValueError for a source that cannot be
    read, and if there is no source.
    """
    if any_format and fields.given:
        raise ValueError(
            "any_format (--any-format) reads files as bytes, without fields; leave out the options that name "
            "fields"
        )
    given = [paths] if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else paths
    if is_dataset(paths):
        given = [paths]
    found: list[DatasetSource | LocalFile | Remote] = []
    local: list[Path] = []
    skipped: Skipped = {}
    for each in given:
        if is_dataset(each):
            found.append(DatasetSource(each, fields))
        elif is_remote(each):
            found += remote_files.find(str(each), pattern, skipped)
        elif is_dataset_folder(Path(each)):
            found.append(_saved(Path(each), fields))
        else:
            local.append(Path(each))
    if local:
        paths_found = expand(local, pattern, skipped, datasets=not any_format)
        found += [_saved(path, fields) if path.is_dir() else LocalFile(path) for path in paths_found]
    if not found:
        raise ValueError("no data is given: give a path, an address or a data set")
    files = [each for each in found if not isinstance(each, DatasetSource)]
    selected = select(
        files, skipped, fields=fields, any_format=any_format, may_be_empty=len(files) < len(found)
    )
    chosen = set(map(id, selected))
    sources: list[Source] = []
    for each in found:
        if isinstance(each, DatasetSource):
            sources.append(each)
        elif id(each) in chosen:
            reader = None if any_format else reader_of(each.name, fields)
            sources.append(FileSource(each, reader, fields))
    return sources


def _saved(folder: Path, fields: Fields) -> DatasetSource:
    return DatasetSource(hugging_face.load(folder), fields, folder)


def identity_of(sources: list[Source]) -> str:
    """Return a hash of the sources, which changes when a source changes."""
    identities = "\n".join(source.identity for source in sources)
    return hashlib.sha256(identities.encode(errors="surrogateescape")).hexdigest()  # names of any encoding
