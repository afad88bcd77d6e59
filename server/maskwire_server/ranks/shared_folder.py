"""Checks that all ranks share the folder of checkpoints: each looks for a file from the leader."""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from maskwire_server.errors import ConfigError

log = logging.getLogger(__name__)

_PREFIX = ".probe-"


def place_probe(folder: Path) -> Path:
    """Create a file that the other ranks must see, and return its path. Raises OSError.

    The file is empty, so that it can be created on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{_PREFIX}*"):  # left behind by a process that was killed
        old.unlink()
    path = folder.resolve() / f"{_PREFIX}{secrets.token_hex(16)}"
    path.touch(exist_ok=False)
    return path


def sees(path: Path) -> bool:
    """Whether this rank finds the file that the leader created, and can create another one beside it."""
    own = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    try:
        if not path.exists():
            return False
        own.touch()
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
    return True


@dataclass(frozen=True)
class SavePlace:
    """Where checkpoints are saved, and which ranks write them."""

    folder: Path
    """The folder of all checkpoints of the run."""
    saved_by: str
    """`distributed.checkpoints_by`."""

    def wanted(self, size: int) -> bool:
        """Whether each of `size` ranks should write its own files if it can."""
        return size > 1 and self.saved_by != "leader"

    def decide(self, without: list[int]) -> bool:
        """Decide whether each rank writes its own files. `without` lists the ranks that lack the folder.

        Raises ConfigError if each rank must write its own files, but cannot.
        """
        if not without:
            log.info("each rank writes its part of checkpoints to %s", self.folder.resolve())
            return True
        problem = (
            f"{self.folder.resolve()} is not the same folder on rank {without[0]}"
            f"{f' and {len(without) - 1} others' if len(without) > 1 else ''}, so that not every rank can "
            "write its part of a checkpoint"
        )
        cure = f"replace {self.folder} with a link to a folder that all hosts share at the same path"
        if self.saved_by == "ranks":
            raise ConfigError(
                f"distributed.checkpoints_by is ranks, but {problem}; {cure}, or set it to leader"
            )
        log.warning("%s: the leader gathers the state of all ranks, and writes it; to change that, %s",
                    problem, cure)  # fmt: skip
        return False
