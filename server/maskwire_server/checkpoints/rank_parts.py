"""The files of a checkpoint that several ranks write, in a separate folder until all are durable."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from maskwire_server.checkpoints.files import PARTS, flush
from maskwire_server.journal.fsync import flush_folder
from maskwire_server.results import FileInfo


class PartFiles:
    """Operations on the files of a checkpoint that ranks write. All methods can raise OSError."""

    def begin(self, folder: Path) -> Path:
        """Create a folder for the ranks' files within the checkpoint's folder, and return its path.

        Each save has its own, so that a surviving rank of an earlier group cannot change the files of a later
        checkpoint.
        """
        parts = folder / f"{PARTS}{secrets.token_hex(8)}"
        parts.mkdir()
        return parts

    def describe(self, parts: Path, names: Iterable[str]) -> list[FileInfo]:
        """Make the files that this rank wrote durable, and describe them as read back from the disk."""
        found = [flush(parts / name) for name in names]
        flush_folder(parts)
        return found

    def place(self, parts: Path, folder: Path, files: Iterable[FileInfo]) -> None:
        """Move the files of all ranks from `parts` to the checkpoint's folder, and make the move durable."""
        for file in files:
            (parts / file.name).rename(folder / file.name)
        parts.rmdir()
        flush_folder(folder)
