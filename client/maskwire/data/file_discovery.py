"""The files that data consists of: which ones of the paths that were given are text to train on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from maskwire.data import file_types

log = logging.getLogger(__name__)


def find_files(
    paths: str | Path | Iterable[str | Path], pattern: str = "*", *, any_format: bool = False
) -> list[Path]:
    """The non-empty files, sorted by path, without what maskwire wrote itself.

    ValueError names a path that is not there, and unless `any_format` files of another format than text.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            prepared = {
                meta.parent for meta in path.rglob(file_types.META)
            }  # no text, though it lies among texts
            inside = (p for p in path.rglob(pattern) if not _hidden(p.relative_to(path)))
            found |= {
                p for p in inside if p.is_file() and p.stat().st_size and prepared.isdisjoint(p.parents)
            }
        elif path.is_file():
            file_types.refuse_part(path)
            found |= {path} if path.stat().st_size else set()
        else:
            raise ValueError(f"{path}: no such file or folder")
    return _check_files(sorted(found), any_format)


def _check_files(files: list[Path], any_format: bool) -> list[Path]:
    run_files = file_types.RunFiles()
    data: list[Path] = []
    left_out: list[Path] = []
    refused: dict[Path, file_types.Format] = {}
    binary: list[Path] = []
    for path in files:
        head = file_types.read_head(path)
        if run_files.owns(path, head):
            left_out.append(path)
            continue
        data.append(path)
        if not any_format:
            kind = file_types.recognize(path, head)
            if kind is not None:
                refused[path] = kind
            elif b"\0" in head:
                binary.append(path)
    written = f"{_names(left_out)}, which maskwire wrote (a run, metrics, a configuration, a log or a result)"
    if refused:
        raise file_types.refuse(refused)
    if not data:
        raise ValueError(
            "there is no file with anything in it in the paths given"
            + (f" except {written}" if left_out else "")
        )
    if left_out:
        log.warning("not taken as data: %s", written)
    if binary:
        log.warning(
            "%s: not text (zero bytes); each byte is taken as a token. Packed ids need --dtype, alone",
            _names(binary),
        )
    return data


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
