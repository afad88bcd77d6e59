"""The files of one checkpoint that several ranks write: in a folder of their own, until all are durable."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from maskwire_server.checkpoints.files import PARTS, flush
from maskwire_server.journal.fsync import flush_folder
from maskwire_server.results import FileInfo


class PartFiles:
    """What the ranks do with the files that they write. All methods raise OSError."""

    def begin(self, folder: Path) -> Path:
        """Create the folder for the ranks' files, in that of the checkpoint.

        No other save uses it. A rank of an earlier group, which ought to have ended, can therefore not
        change the files of a later checkpoint.
        """
        parts = folder / f"{PARTS}{secrets.token_hex(8)}"
        parts.mkdir()
        return parts

    def describe(self, parts: Path, names: Iterable[str]) -> list[FileInfo]:
        """Make the files that this rank wrote durable, and describe what the disk then holds."""
        found = [flush(parts / name) for name in names]
        flush_folder(parts)
        return found

    def place(self, parts: Path, folder: Path, files: Iterable[FileInfo]) -> None:
        """Move the files of all ranks into the folder of their checkpoint, durably."""
        for file in files:
            (parts / file.name).rename(folder / file.name)
        parts.rmdir()
        flush_folder(folder)
