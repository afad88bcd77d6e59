"""Token data as a pure function: `batch(step)` depends on the seed and the step alone.

So there is no iterator to save: a job that starts again at step s asks for batch s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint8] | list[npt.NDArray[np.uint8]]
_HASH_RANGE = 2**32


class ByteData:
    """Files and folders of bytes, each byte a token; files are mapped, not read.

    A row is a random crop of `length` bytes of one file, each place in the data equally likely; a file
    that is shorter is a row by itself.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        pattern: str = "*",
    ) -> None:
        """`paths` are files, or folders searched for `pattern`; hidden and empty files are left out.

        Raises ValueError for a length or batch size below 1, or when no file has anything in it.
        """
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.files = find_files(paths, pattern)
        self._begin([np.memmap(path, dtype=np.uint8, mode="r") for path in self.files])

    def _begin(self, documents: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._documents = documents
        starts = [max(1, document.size - self.length + 1) for document in documents]
        self._ends = np.cumsum(np.array(starts, dtype=np.int64))

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(document.size for document in self._documents)

    def batch(self, step: int) -> Rows:
        """The batch of a step: uint8 [batch_size, length], or a list of rows if some are shorter."""
        return self._crops(
            np.random.default_rng((self.seed, step)).integers(self._ends[-1], size=self.batch_size)
        )

    def spread(self, rows: int) -> Rows:
        """Rows evenly spread over the data, always the same: for evaluation."""
        return self._crops((np.arange(rows) + 0.5) / rows * self._ends[-1])

    def _crops(self, places: npt.NDArray[np.generic]) -> Rows:
        crops = []
        for place in places.astype(np.int64):
            document = int(np.searchsorted(self._ends, place, side="right"))
            start = int(place) - (int(self._ends[document - 1]) if document else 0)
            crops.append(np.asarray(self._documents[document][start : start + self.length]))
        return np.stack(crops) if len({crop.size for crop in crops}) == 1 else crops

    def split(self, held_out: float) -> tuple[ByteData, ByteData]:
        """(training, held out): each file goes by the hash of its bytes, so that copies stay together.

        Raises ValueError unless both get a file.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
        apart = [_fraction(document) < held_out for document in self._documents]
        if all(apart) or not any(apart):
            raise ValueError(
                f"held_out = {held_out} leaves {len(apart) - sum(apart)} files to train on and {sum(apart)} "
                f"held out, of {len(apart)}: both need one; use more files, or another share"
            )
        return self._of([not held for held in apart]), self._of(apart)

    def _of(self, chosen: list[bool]) -> ByteData:
        part = object.__new__(ByteData)
        part.length, part.batch_size, part.seed = self.length, self.batch_size, self.seed
        part.files = [file for file, here in zip(self.files, chosen, strict=True) if here]
        part._begin([d for d, here in zip(self._documents, chosen, strict=True) if here])
        return part

    def unigram_bits_per_byte(self) -> float:
        """The entropy of the data's byte frequencies: what knowing them alone is worth."""
        counts = sum((np.bincount(d, minlength=256) for d in self._documents), np.zeros(256, dtype=np.int64))
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log2(share)).sum())


def find_files(paths: str | Path | Iterable[str | Path], pattern: str = "*") -> list[Path]:
    """The non-empty files, sorted by path; ValueError names a path that is not there."""
    if isinstance(paths, str | Path):
        paths = [paths]
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in path.rglob(pattern) if not _hidden(p.relative_to(path)))
            found |= {p for p in inside if p.is_file() and p.stat().st_size}
        elif path.is_file():
            found |= {path} if path.stat().st_size else set()
        else:
            raise ValueError(f"{path}: no such file or folder")
    if not found:
        raise ValueError("there is no file with anything in it in the paths given")
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _fraction(document: npt.NDArray[np.uint8]) -> float:
    return int.from_bytes(hashlib.sha256(document.data).digest()[:4], "little") / _HASH_RANGE
