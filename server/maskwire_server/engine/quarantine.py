"""Quarantine of batches that crash the process.

The batch that is being computed is noted in a small file, which is not fsynced: it only has to survive a
crash of the process. A note found at start names the batch that the last process crashed on.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

from maskwire_server.errors import DeviceLost, StateLost

log = logging.getLogger(__name__)

FILE_NAME = "computing"
_NOTE = struct.Struct("<32si")  # payload hash, crashes so far


def forget(run_dir: Path) -> None:
    """Delete the note that a process left, because the batch was not the cause of its end."""
    with _best_effort():
        (run_dir / FILE_NAME).unlink(missing_ok=True)


class Quarantine:
    """Counts consecutive crashes on one batch, and quarantines the batch after `after` of them."""

    def __init__(self, run_dir: Path, after: int) -> None:
        self._path = run_dir / FILE_NAME
        self._after = after
        self._hash, self._crashes = b"", 0
        if self._path.exists() and self._path.stat().st_size == _NOTE.size:
            self._hash, before = _NOTE.unpack(self._path.read_bytes())
            self._crashes = before + 1
            log.warning(
                "the process crashed %d times while computing the batch %s",
                self._crashes,
                self._hash.hex()[:16],
            )

    def holds(self, payload_hash: bytes) -> bool:
        """Whether a batch has crashed the process too often to be computed again."""
        return payload_hash == self._hash and self._crashes >= self._after

    @contextlib.contextmanager
    def watch(self, payload_hash: bytes) -> Iterator[None]:
        """Keep a note of a batch while it is computed. An exception is a crash if it ends the process."""
        crashes = self._crashes if payload_hash == self._hash else 0
        with _best_effort():
            self._path.write_bytes(_NOTE.pack(payload_hash, crashes))
        lost = False
        try:
            yield
        except (DeviceLost, StateLost):
            lost = True
            raise
        finally:
            if not lost:
                with _best_effort():
                    self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _best_effort() -> Iterator[None]:
    """Log an error in writing or deleting the note, because it must not make the step fail."""
    try:
        yield
    except OSError as error:
        log.warning(
            "the note of the current batch was not written or deleted, so its crashes may be miscounted: %s",
            error,
        )
