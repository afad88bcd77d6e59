"""Batches that the process dies of: noted before they are computed, set aside when it happened often enough.

The note is a few bytes in a file that is not flushed: they outlive the process, which is all they are for.
A note that is left when the process starts again is of a batch that it died with.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "computing"
_NOTE = struct.Struct("<32si")  # payload hash, times that the process died with it


class Poison:
    """Counts deaths of one batch after another; `after` 0 counts nothing."""

    def __init__(self, run_dir: Path, after: int) -> None:
        self._path = run_dir / FILE_NAME
        self._after = after
        self._hash, self._deaths = b"", 0
        if after and self._path.exists() and self._path.stat().st_size == _NOTE.size:
            self._hash, before = _NOTE.unpack(self._path.read_bytes())
            self._deaths = before + 1
            log.warning(
                "the process died %d times computing the batch %s", self._deaths, self._hash.hex()[:16]
            )

    def condemned(self, payload_hash: bytes) -> bool:
        """Whether a batch is to be set aside."""
        return bool(self._after) and payload_hash == self._hash and self._deaths >= self._after

    @contextlib.contextmanager
    def watch(self, payload_hash: bytes) -> Iterator[None]:
        """Note a batch while it is computed; an exception is no death."""
        if not self._after:
            yield
            return
        deaths = self._deaths if payload_hash == self._hash else 0
        with _best_effort():
            self._path.write_bytes(_NOTE.pack(payload_hash, deaths))
        try:
            yield
        finally:
            with _best_effort():
                self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _best_effort() -> Iterator[None]:
    """A note that cannot be kept must not cost a step."""
    try:
        yield
    except OSError as error:
        log.warning("the note of the batch that is computed could not be kept: %s", error)
