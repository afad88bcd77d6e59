"""Documents of token ids as parts of flat arrays, in files or held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwire.data.file_array import FileArray, Files, Ids

_HASH_RANGE = 2**32
_MAGIC = b"\x93NUMPY"
_CHUNK = 2**22  # ids read at a time where all of a document is needed


class Documents:
    """Documents as parts of flat arrays, each a few bytes of memory here."""

    def __init__(
        self,
        arrays: Sequence[Ids | FileArray] | Files,
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
        files = Files(paths)
        which = np.arange(len(paths), dtype=np.int32)
        return Documents(files, which, np.zeros_like(files.sizes), files.sizes)

    @staticmethod
    def packed(flat: Ids | FileArray, ends: npt.NDArray[np.int64]) -> Documents:
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

    def crop(self, index: int, start: int, length: int) -> Ids:
        """At most `length` ids of a document from `start`."""
        begin = int(self._starts[index])
        end = begin + int(self.sizes[index])
        return np.asarray(self._arrays[self._which[index]][begin + start : min(end, begin + start + length)])

    def chunks(self, index: int) -> Iterator[Ids]:
        """A document, a part at a time: it may be larger than memory."""
        for start in range(0, int(self.sizes[index]), _CHUNK):
            yield self.crop(index, start, _CHUNK)

    def fraction(self, index: int) -> float:
        """A number in [0, 1) from a document's ids, whatever type they are kept in."""
        narrow = narrowest(max(int(ids.max()) for ids in self.chunks(index)))
        digest = hashlib.sha256()
        for ids in self.chunks(index):
            digest.update(np.ascontiguousarray(ids, dtype=narrow).data)
        return int.from_bytes(digest.digest()[:4], "little") / _HASH_RANGE


def narrowest(top: int) -> str:
    """The narrowest type that holds ids up to `top`: what they are hashed as, however they are kept."""
    return "<u1" if top < 2**8 else "<u2" if top < 2**16 else "<i4" if top < 2**31 else "<i8"


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


def load_array(path: Path) -> tuple[FileArray, npt.NDArray[np.int64]]:
    """A `.npy` file as flat ids and the documents' ends."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic.startswith(b"PK"):
            raise ValueError("it holds several arrays, .npz; save one as .npy")
        if magic != _MAGIC:
            raise ValueError("it does not begin as one")
        # Mapped for a moment, which checks the header against the file's size.
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a .npy file ({error})") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{path} must hold integers [n] or [rows, n], got {array.dtype} {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path} must be in C order; save np.ascontiguousarray(…) of it")
    ids = FileArray(path, array.dtype, array.offset, array.size)
    rows = array.shape[0] if array.ndim == 2 else 1
    return ids, np.arange(1, rows + 1) * (array.size // rows)
