"""The lock of a run directory, and the check that a new run starts in an empty one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.disk import FULL, of_volume

JOURNAL_FILE = "journal.sqlite"


def lock(run_dir: Path) -> int:
    """Lock the run directory for this process and return the descriptor that holds the lock.

    Raises RunDirectoryError if another process holds the lock.
    """
    # A separate file: closing any descriptor of the database would drop SQLite's locks on it.
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunDirectoryError(
            f"{run_dir}: another server (process {holder or 'unknown'}) uses this run directory; stop it, "
            "or choose another directory with --run-dir"
        ) from None
    try:  # so that the message above can name the process to stop
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        if error.errno not in FULL:
            os.close(descriptor)
            raise
    return descriptor


def refuse_leftovers(run_dir: Path) -> None:
    """Raise RunDirectoryError if a directory without a journal holds unexpected files."""
    unexpected = sorted(
        path.name
        for path in run_dir.iterdir()
        if path.name != "lock"
        and not path.name.startswith(JOURNAL_FILE)
        and path.suffix not in (".toml", ".log")
        and not of_volume(path.name)
        and not (path.name == "checkpoints" and path.is_dir() and not any(path.iterdir()))
    )
    if unexpected == ["checkpoints"]:
        raise RunDirectoryError(
            f"{run_dir}: has checkpoints but no journal, so the journal was lost; restore {JOURNAL_FILE} "
            "from a copy, or start a new run in an empty directory"
        )
    if unexpected:
        raise RunDirectoryError(
            f"{run_dir}: must be empty for a new run, but contains {', '.join(unexpected[:3])}; choose "
            "another directory with --run-dir"
        )
