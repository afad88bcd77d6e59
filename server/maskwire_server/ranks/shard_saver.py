"""Saves a checkpoint on all ranks: each writes its own part of the state, on a background thread.

The leader sends the order to write through a separate process group, so that training continues in the
meantime. Each rank writes its files, makes them durable and reports their names, sizes and SHA-256. The
leader then moves the files into place, and writes the manifest that makes them a checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maskwire_server import failpoints
from maskwire_server.ranks.liveness import GRACE_SECONDS
from maskwire_server.ranks.orders import Order
from maskwire_server.ranks.process_group import Member
from maskwire_server.results import FROZEN_FILE, FileInfo
from maskwire_server.training import checkpoint_tensors
from maskwire_server.training.shards import Shards

log = logging.getLogger(__name__)


class PartFiles(Protocol):
    """File operations for several ranks; see `checkpoints.rank_parts`. All methods may raise OSError."""

    def begin(self, folder: Path) -> Path:
        """Create a folder for the ranks' files in a checkpoint's folder, and return its path."""

    def describe(self, parts: Path, names: Iterable[str]) -> list[FileInfo]:
        """Make files durable, and return their names, sizes and hashes."""

    def place(self, parts: Path, folder: Path, files: Iterable[FileInfo]) -> None:
        """Move the files of all ranks into the folder of their checkpoint."""


class ShardSaver:
    """Saves this rank's part of each checkpoint. The training thread calls `keep`."""

    def __init__(self, member: Member, files: PartFiles) -> None:
        self._member, self._files = member, files
        self._kept: tuple[int, Shards] | None = None
        if not member.is_leader:
            threading.Thread(target=self._serve, name="maskwire-saver", daemon=True).start()

    def keep(self, number: int, copy: Callable[[], Shards]) -> None:
        """Copy this follower's part of the state, and keep the copy until it is written or replaced.

        The ranks confirm the order to copy only after the copy is made, so that the copy exists when the
        order to write it arrives.
        """
        self._kept = None  # so that its memory can be reused
        self._kept = number, copy()

    def snapshot(self, number: int, shards: Shards) -> ShardSnapshot:
        """The snapshot with which the leader writes copy `number` of all ranks."""
        return ShardSnapshot(self, number, shards)

    def write(self, number: int, shards: Shards, folder: Path) -> list[FileInfo]:
        """Write the files of all ranks into the folder of a checkpoint. Raises OSError if a rank cannot."""
        parts = self._files.begin(folder)
        with_frozen = not _has_frozen(folder, shards)
        order = Order("write", {"number": number, "parts": str(parts.resolve()), "frozen": with_frozen})
        try:
            self._member.order_save(order)
            reports = self._member.exchange(self._report(shards, parts, with_frozen=with_frozen))
        except Exception as error:
            self._end(error)
            raise
        found = _joined(reports)
        failpoints.passing("shard.gathered")
        self._files.place(parts, folder, found)
        failpoints.passing("shard.placed")
        _check_complete(folder, shards)
        return found

    def _serve(self) -> None:
        try:
            while True:
                order = self._member.next_save()
                failpoints.passing("shard.ordered")
                given = order.arguments
                kept, self._kept = self._kept, None
                if kept is None or kept[0] != given["number"]:
                    report = _failed(errno.EIO, f"it has no copy number {given['number']}")
                else:
                    report = self._report(kept[1], Path(given["parts"]), with_frozen=given["frozen"])
                del kept  # so that its memory can be reused for the next copy
                self._member.exchange(report)
        except Exception as error:
            self._end(error)

    def _report(self, shards: Shards, parts: Path, *, with_frozen: bool) -> bytes:
        """Write this rank's files. Returns their description, or the error, encoded for the other ranks."""
        try:
            names = shards.write(parts, with_frozen=with_frozen)
            files = self._files.describe(parts, names)
        except OSError as error:
            return _failed(error.errno or errno.EIO, error.strerror or str(error))
        failpoints.passing("shard.flushed")
        return json.dumps([[file.name, file.size_bytes, file.sha256.hex()] for file in files]).encode()

    def _end(self, error: Exception) -> None:
        """End this process, because the other ranks wait for it, or have ended."""
        time.sleep(GRACE_SECONDS)
        self._member.lost(
            f"rank {self._member.place.rank} failed in a save: {error}", False
        )  # not by a batch


@dataclass(frozen=True)
class ShardSnapshot:
    """A copy of the state, of which each rank holds a part in host memory."""

    saver: ShardSaver
    number: int
    shards: Shards

    def write(self, folder: Path) -> Sequence[FileInfo]:
        """Write the files of all ranks durably, and return their descriptions. Raises OSError."""
        return self.saver.write(self.number, self.shards, folder)


def _failed(number: int, problem: str) -> bytes:
    return json.dumps({"errno": number, "problem": problem}).encode()


def _joined(reports: Sequence[bytes]) -> list[FileInfo]:
    """The files in the reports of all ranks. Raises OSError if a rank could not write its files."""
    found = []
    for rank, report in enumerate(reports):
        told = json.loads(report)
        if isinstance(told, dict):
            raise OSError(told["errno"], f"rank {rank} cannot write its files: {told['problem']}")
        found += [FileInfo(name, size, bytes.fromhex(sha256)) for name, size, sha256 in told]
    return found


def _has_frozen(folder: Path, shards: Shards) -> bool:
    """Whether the folder already has links to all frozen weights. Removes incomplete links."""
    names = shards.names.get(FROZEN_FILE, frozenset())
    paths = checkpoint_tensors.files_of(folder, FROZEN_FILE)
    try:
        if paths and checkpoint_tensors.find(paths, FROZEN_FILE).keys() == names:
            return True
    except ValueError as error:
        log.warning("frozen weights are written again: %s", error)
    for path in paths:
        path.unlink()
    return False


def _check_complete(folder: Path, shards: Shards) -> None:
    """Raise OSError unless the files contain all tensors of the state, with each row exactly once."""
    try:
        for file, names in shards.names.items():
            found = checkpoint_tensors.find(checkpoint_tensors.files_of(folder, file), file)
            if found.keys() != names:
                name = min(found.keys() ^ names)
                problem = "is missing" if name in names else "was written, but the state has no such tensor"
                raise ValueError(f"{file}: {name} {problem}")
    except ValueError as error:
        raise OSError(errno.EIO, str(error)) from error
