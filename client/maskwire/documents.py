"""Documents of token ids as parts of flat arrays, mapped from files or held in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]
_HASH_RANGE = 2**32
_MAPS = 128
_MAGIC = b"\x93NUMPY"


class _Mapped(Sequence[Ids]):
    """Files as arrays of bytes, mapped when asked for: each map holds a file descriptor."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._map = functools.lru_cache(_MAPS)(lambda path: np.memmap(path, dtype=np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return self._map(self._paths[index])


class Documents:
    """Documents as parts of flat arrays, each a few bytes of memory here."""

    def __init__(
        self,
        arrays: Sequence[Ids],
        which: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self._arrays, self._which, self._starts, self.sizes = arrays, which, starts, sizes

    @staticmethod
    def apart(arrays: Sequence[Ids]) -> Documents:
        """Each array a document."""
        sizes = np.array([array.size for array in arrays], dtype=np.int64)
        which = np.arange(len(arrays), dtype=np.int32)
        return Documents(list(arrays), which, np.zeros_like(sizes), sizes)

    @staticmethod
    def files(paths: Sequence[Path]) -> Documents:
        """Each file's bytes a document; only the last few that were read are open."""
        sizes = np.array([path.stat().st_size for path in paths], dtype=np.int64)
        which = np.arange(len(paths), dtype=np.int32)
        return Documents(_Mapped(paths), which, np.zeros_like(sizes), sizes)

    @staticmethod
    def packed(flat: Ids, ends: npt.NDArray[np.int64]) -> Documents:
        """One after another in `flat`, ending at `ends`."""
        sizes = np.diff(ends, prepend=0)
        if ends.ndim != 1 or not ends.size or (sizes < 1).any() or ends[-1] != flat.size:
            raise ValueError("the documents' ends do not fit the tokens; prepare the data again")
        return Documents([flat], np.zeros(ends.size, dtype=np.int32), ends - sizes, sizes)

    def choose(self, chosen: npt.NDArray[np.bool_]) -> Documents:
        """Some of them."""
        return Documents(self._arrays, self._which[chosen], self._starts[chosen], self.sizes[chosen])

    def __len__(self) -> int:
        return self.sizes.size

    def __getitem__(self, index: int) -> Ids:
        return self.crop(index, 0, int(self.sizes[index]))

    def crop(self, index: int, start: int, length: int) -> Ids:
        """At most `length` ids of a document from `start`."""
        begin = int(self._starts[index])
        end = begin + int(self.sizes[index])
        return np.asarray(self._arrays[self._which[index]][begin + start : min(end, begin + start + length)])

    def fraction(self, index: int) -> float:
        """A number in [0, 1) from a document's ids, whatever type they are kept in."""
        ids = self[index]
        top = int(ids.max(initial=0))
        narrow = "<u1" if top < 2**8 else "<u2" if top < 2**16 else "<i4" if top < 2**31 else "<i8"
        data = np.ascontiguousarray(ids, dtype=narrow).data
        return int.from_bytes(hashlib.sha256(data).digest()[:4], "little") / _HASH_RANGE


class Tiles(Sequence[Ids]):
    """Documents cut into rows side by side, read when asked for."""

    def __init__(self, documents: Documents, length: int) -> None:
        self._documents, self._length = documents, length
        self._ends = np.cumsum(-(-documents.sizes // length))

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self._documents.sizes.sum())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row must be 0 to {len(self) - 1}, got {index}")
        index %= len(self)
        document = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[document - 1]) if document else 0)
        return self._documents.crop(document, place * self._length, self._length)


def load_array(path: Path) -> tuple[Ids, npt.NDArray[np.int64]]:
    """A `.npy` file as flat ids and the documents' ends."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic.startswith(b"PK"):
            raise ValueError("it holds several arrays, .npz; save one as .npy")
        if magic != _MAGIC:
            raise ValueError("it does not begin as one")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a .npy file ({error})") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{path} must hold integers [n] or [rows, n], got {array.dtype} {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path} must be in C order; save np.ascontiguousarray(…) of it")
    return array.reshape(-1), np.arange(1, array.shape[0] + 1) * array.shape[1] if array.ndim == 2 else (
        np.array([array.size])
    )
