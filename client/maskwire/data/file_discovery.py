"""Find the files to train on: expand folders, leave out maskwire's own files, refuse what is not text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from maskwire.data.file_types import RECORD_TYPES, FileType, detect, read_head, unsupported
from maskwire.data.maskwire_output import MaskwireOutput
from maskwire.data.prepared_folder import METADATA, refuse_part

log = logging.getLogger(__name__)


def find_files(
    paths: str | Path | Iterable[str | Path],
    pattern: str = "*",
    *,
    any_format: bool = False,
    is_records: Callable[[str], object] | None = None,
    only_records: bool = False,
) -> list[Path]:
    """Return the non-empty data files, sorted by path, without files that maskwire itself wrote.

    `is_records(name)` says whether a file holds records, such as JSON Lines; these are accepted like text.
    With `only_records`, all other files are left out. Raises ValueError for a path that does not exist and,
    unless `any_format`, for files that are neither text nor records.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    given = list(map(Path, paths))
    found: set[Path] = set()
    for path in given:
        if path.is_dir():
            prepared = {metadata.parent for metadata in path.rglob(METADATA)}
            visible = (p for p in path.rglob(pattern) if not _hidden(p.relative_to(path)))
            found |= {
                p
                for p in visible
                if p.is_file() and p.stat().st_size and not (prepared and prepared.intersection(p.parents))
            }
        elif path.is_file():
            refuse_part(path)
            found |= {path} if path.stat().st_size else set()
        else:
            raise ValueError(f"{path}: no such file or folder")
    if not found:
        raise ValueError(
            f"no data found in {_names(given)}: all files are empty or hidden, are in a prepared folder, or "
            f"do not match {pattern!r}"
        )
    return _select(sorted(found), any_format, is_records or (lambda _: False), only_records)


def _select(
    files: list[Path], any_format: bool, is_records: Callable[[str], object], only_records: bool
) -> list[Path]:
    maskwire_output = MaskwireOutput()
    data: list[Path] = []
    skipped: list[Path] = []
    refused: dict[Path, FileType] = {}
    binary: list[Path] = []
    others: list[Path] = []
    for path in files:
        head = read_head(path)
        if maskwire_output.includes(path, head):
            skipped.append(path)
            continue
        if only_records and not is_records(path.name):
            others.append(path)
            continue
        data.append(path)
        if not any_format:
            file_type = detect(path, head)
            if is_records(path.name):
                file_type = None if file_type in RECORD_TYPES else file_type
            if file_type is not None:
                refused[path] = file_type
            elif b"\0" in head and not is_records(path.name):
                binary.append(path)
    if refused:
        raise unsupported(refused)
    own = "written by maskwire itself (run directory, metrics, configuration, log or printed result)"
    if others:
        words = f"{_names(others)}: no records with fields (.jsonl, .csv, .tsv, .parquet, .arrow)"
        if not data:
            raise ValueError(f"{words}; leave out the names of fields to read texts")
        log.warning("skipped %s", words)
    if not data:
        raise ValueError(f"no data found in the given paths: {_names(skipped)} skipped, {own}")
    if skipped:
        log.warning("skipped %s: %s", _names(skipped), own)
    if binary:
        log.warning(
            "%s: not text (it contains zero bytes); each byte becomes a token. If it holds packed ids, give "
            "it alone, with --dtype",
            _names(binary),
        )
    return data


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
