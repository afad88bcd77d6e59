"""Find the files to train on: expand folders and globs, skip what is not data, refuse what is not text."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, TypeVar

from maskwire.data.file_types import (
    HEAD_BYTES,
    RECORD_TYPES,
    ZERO_BYTES,
    FileType,
    detect,
    unsupported,
)
from maskwire.data.hugging_face import is_dataset_folder
from maskwire.data.maskwire_output import MaskwireOutput, is_recognized
from maskwire.data.prepared_folder import METADATA, refuse_part
from maskwire.data.record import Fields
from maskwire.data.record_files import TABULAR, TEXT_RECORDS, reader_of

log = logging.getLogger(__name__)

HIDDEN = "hidden"
EMPTY = "empty"
PREPARED = "prepared data; open a prepared folder alone"
BROKEN = "a link to nothing"
LINKED = "a link to a folder, which is not followed; give the folder as a path of its own"
SPECIAL = "not a regular file"
OWN = "written by maskwire itself (run directory, metrics, configuration, log or printed result)"
NO_FIELDS = "no records with fields (.jsonl, .csv, .tsv, .parquet, .arrow)"

Skipped = dict[str, dict[str, None]]
"""The names that are left out, by reason: each name once, in order."""


class File(Protocol):
    """The interface of local and remote files."""

    name: str
    """Its path or address."""
    size: int
    """In bytes; 0 if unknown."""
    identity: str
    """Changes when the file changes."""

    @property
    def head(self) -> bytes:
        """The first `HEAD_BYTES` bytes of the file."""

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes. The result is seekable."""


AnyFile = TypeVar("AnyFile", bound=File)


class LocalFile:
    """A file at a local path."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        found = path.stat()
        self.size = found.st_size
        self.identity = f"{path.absolute()} {found.st_size} {found.st_mtime_ns}"

    @property
    def head(self) -> bytes:
        """The first `HEAD_BYTES` bytes of the file."""
        with self.open() as file:
            return file.read(HEAD_BYTES)

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes."""
        return self.path.open("rb")


def find_files(
    paths: str | Path | Iterable[str | Path], pattern: str = "*", *, any_format: bool = False
) -> list[Path]:
    """Return the non-empty text files, sorted by path, without files that maskwire itself wrote.

    Raises ValueError for a path that does not exist and, unless `any_format`, for files that are not text.
    """
    skipped: Skipped = {}
    files = [LocalFile(path) for path in expand(paths, pattern, skipped)]
    return [file.path for file in select(files, skipped, any_format=any_format)]


def expand(
    paths: str | Path | Iterable[str | Path], pattern: str, skipped: Skipped, *, datasets: bool = False
) -> list[Path]:
    """Return the non-empty files that are given as paths, folders or globs, sorted by path.

    With `datasets`, a folder that holds a saved data set is returned as a folder, and is not searched for
    files. Files and folders that are left out are added to `skipped`. Raises ValueError for a path that does
    not exist, and if no file is found.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    found: set[Path] = set()
    for path in (each for one in given for each in _matches(one, skipped)):
        if datasets and is_dataset_folder(path):
            found.add(path)
        elif path.is_dir():
            found |= _in_folder(path, pattern, skipped, datasets)
        elif path.is_file():
            refuse_part(path)
            if path.stat().st_size:
                found.add(path)
            else:
                skip(skipped, EMPTY, path)
        elif path.is_symlink():
            raise ValueError(
                f"{path} is a link to {path.readlink()}, which does not exist; give another path"
            )
        else:
            raise ValueError(f"{path}: {SPECIAL}" if path.exists() else f"{path}: no such file or folder")
    if not found:
        why = [f"no other file matches {pattern!r}" if skipped else f"no file matches {pattern!r}"]
        raise ValueError(f"no data found in {names(given)}: {'; '.join([*reasons(skipped), *why])}")
    return sorted(found)


def _matches(path: Path, skipped: Skipped) -> list[Path]:
    """Return the paths that match a glob; a path that exists, or that is no glob, is returned unchanged.

    `**` stands for folders, but not for links to folders, which may lead back to a folder above them.
    """
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [path]
    root = Path(path.anchor)
    found = _glob(root, path.relative_to(root).parts, skipped)
    if "**" in path.parts:
        for link in [each for each in found if each.is_symlink() and each.is_dir()]:
            skip(skipped, LINKED, link)
            found.remove(link)
    if not found:
        raise ValueError(f"{path}: no file or folder matches this glob")
    return sorted(found)


def _glob(folder: Path, parts: tuple[str, ...], skipped: Skipped) -> set[Path]:
    """Return the paths in a folder that match the parts of a glob."""
    if "**" not in parts:
        pattern = str(Path(*parts))
        return {folder / each for each in glob.glob(pattern, root_dir=folder)}  # noqa: PTH207 (skips hidden files)
    place = parts.index("**")
    roots = _glob(folder, parts[:place], skipped) if place else {folder}
    inner = {each for root in roots if root.is_dir() for each in _folders(root, skipped)}
    rest = parts[place + 1 :]
    return {found for each in inner for found in _glob(each, rest, skipped)} if rest else inner


def _folders(root: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield a folder and the folders in it, without hidden ones and links."""
    for parent, folders, _ in os.walk(root, onerror=_raise):
        yield Path(parent)
        for name in [each for each in folders if each.startswith(".")]:
            folders.remove(name)
        for link in [each for each in folders if Path(parent, each).is_symlink()]:
            skip(skipped, LINKED, Path(parent, link))
            folders.remove(link)


def _in_folder(root: Path, pattern: str, skipped: Skipped, datasets: bool) -> set[Path]:
    found: set[Path] = set()
    matching: set[Path] = set()
    walked: set[Path] = set()
    for parent, folders, _ in os.walk(root, onerror=_raise):
        folder = Path(parent)
        if (folder / METADATA).is_file():
            skip(skipped, PREPARED, folder)
            folders.clear()
            continue
        walked.add(folder)
        matching.update(folder.glob(pattern))
        for name in sorted(folders):
            inner = folder / name
            if name.startswith("."):
                skip(skipped, HIDDEN, inner)
            elif inner.is_symlink():
                skip(skipped, LINKED, inner)
            elif datasets and inner in matching and is_dataset_folder(inner):
                found.add(inner)
            else:
                continue
            folders.remove(name)
    for path in sorted(path for path in matching if path.parent in walked):
        if path.is_dir():
            continue
        if path.name.startswith("."):
            skip(skipped, HIDDEN, path)
        elif not path.exists():
            skip(skipped, BROKEN, path)
        elif not path.is_file():
            skip(skipped, SPECIAL, path)
        elif not path.stat().st_size:
            skip(skipped, EMPTY, path)
        else:
            found.add(path)
    return found


def _raise(error: OSError) -> None:
    raise error


def select(
    files: Sequence[AnyFile],
    skipped: Skipped,
    *,
    fields: Fields | None = None,
    any_format: bool = False,
    may_be_empty: bool = False,
) -> list[AnyFile]:
    """Return the files that are data: skip maskwire's own files with a message, and refuse other types.

    With `fields`, files with records, such as JSON Lines, are accepted like text; if a field is named, all
    other files are left out. Raises ValueError for a refused file, and if no file is left, unless
    `may_be_empty`.
    """
    maskwire_output = MaskwireOutput()
    data: list[AnyFile] = []
    refused: dict[str, FileType] = {}
    binary: list[str] = []
    tables: list[str] = []
    for file in files:
        head, path = file.head, PurePosixPath(file.name)
        if isinstance(file, LocalFile):
            own = maskwire_output.includes(file.path, head)
        else:
            own = is_recognized(path, head, file.size)
        is_records = fields is not None and not any_format and reader_of(path.name, fields) is not None
        if own or (fields is not None and fields.given and not is_records):
            skip(skipped, OWN if own else NO_FIELDS, file.name)
            continue
        data.append(file)
        if any_format:
            continue
        file_type = detect(path.name, head, file.size)
        if is_records and file_type in RECORD_TYPES:
            zeros = path.suffix.lower() in TEXT_RECORDS and b"\0" in head
            file_type = ZERO_BYTES if zeros else None
        if file_type is not None:
            refused[file.name] = file_type
        elif b"\0" in head and not is_records:
            binary.append(file.name)
        elif fields is not None and not is_records and path.suffix.lower() in TABULAR:
            tables.append(file.name)
    if refused:
        raise unsupported(refused)
    if not data and not may_be_empty:
        if NO_FIELDS in skipped:
            raise ValueError(
                f"{names(skipped[NO_FIELDS])}: {NO_FIELDS}; unpack compressed files first; to read texts, "
                "leave out the options that name fields"
            )
        raise ValueError(f"no data found in the given paths: {names(skipped[OWN])}: {OWN}; give other data")
    for words in reasons(skipped):
        log.warning("skipped %s", words)
    if tables:
        log.warning(
            "%s: read as one text, with any header and field names in it; to read the records, name their "
            "field with --text-field (text_field=)",
            names(tables),
        )
    if binary:
        log.warning(
            "%s: not text (it contains zero bytes); each byte becomes a token. If it holds packed ids, give "
            "it alone, with --dtype",
            names(binary),
        )
    return data


def skip(skipped: Skipped, reason: str, name: object) -> None:
    """Add a name that is left out to `skipped`, under the reason."""
    skipped.setdefault(reason, {})[str(name)] = None


def reasons(skipped: Skipped) -> list[str]:
    """Describe what is left out: one text per reason, with the names."""
    return [f"{names(which)}: {reason}" for reason, which in skipped.items()]


def names(paths: Collection[object]) -> str:
    """Join the names of paths: at most three, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, islice(paths, 3))) + more
