"""Documents of token ids, as parts of flat arrays in files or in memory."""

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
_CHUNK = 2**22  # ids


class Documents:
    """Documents of token ids, as parts of flat arrays. A document takes a few bytes besides its ids."""

    def __init__(
        self,
        arrays: Sequence[Ids | FileArray] | Files,
        which: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self._arrays, self._which, self._starts, self.sizes = arrays, which, starts, sizes

    @staticmethod
    def from_arrays(arrays: Sequence[Ids]) -> Documents:
        """Make documents from arrays of ids, one document per array."""
        sizes = np.array([array.size for array in arrays], dtype=np.int64)
        which = np.arange(len(arrays), dtype=np.int32)
        return Documents(list(arrays), which, np.zeros_like(sizes), sizes)

    @staticmethod
    def from_files(paths: Sequence[Path]) -> Documents:
        """Make one document from the bytes of each file. Only the most recently read files stay open."""
        files = Files(paths)
        which = np.arange(len(paths), dtype=np.int32)
        return Documents(files, which, np.zeros_like(files.sizes), files.sizes)

    @staticmethod
    def from_packed(flat: Ids | FileArray, ends: npt.NDArray[np.int64]) -> Documents:
        """Make documents that follow one another in the array `flat` and end at the positions `ends`."""
        sizes = np.diff(ends, prepend=0)
        if ends.ndim != 1 or not ends.size or (sizes < 1).any() or ends[-1] != flat.size:
            raise ValueError(
                f"the ends of the documents do not match the {flat.size:,} tokens; prepare the data again"
            )
        return Documents([flat], np.zeros(ends.size, dtype=np.int32), ends - sizes, sizes)

    def choose(self, chosen: npt.NDArray[np.bool_]) -> Documents:
        """Return the documents for which `chosen` is true."""
        return Documents(self._arrays, self._which[chosen], self._starts[chosen], self.sizes[chosen])

    def __len__(self) -> int:
        return self.sizes.size

    def crop(self, index: int, start: int, length: int) -> Ids:
        """Read at most `length` ids of a document, from the id at `start` onwards."""
        begin = int(self._starts[index])
        end = begin + int(self.sizes[index])
        return np.asarray(self._arrays[self._which[index]][begin + start : min(end, begin + start + length)])

    def chunks(self, index: int) -> Iterator[Ids]:
        """Yield the ids of a document in parts, because a document may be larger than memory."""
        for start in range(0, int(self.sizes[index]), _CHUNK):
            yield self.crop(index, start, _CHUNK)

    def fraction(self, index: int) -> float:
        """Hash a document's ids to a number in [0, 1). The integer type of the ids does not matter."""
        narrow = narrowest(max(int(ids.max()) for ids in self.chunks(index)))
        digest = hashlib.sha256()
        for ids in self.chunks(index):
            digest.update(np.ascontiguousarray(ids, dtype=narrow).data)
        return int.from_bytes(digest.digest()[:4], "little") / _HASH_RANGE


def narrowest(top: int) -> str:
    """Return the narrowest integer type for ids up to `top`. For hashing, ids are converted to this type."""
    return "<u1" if top < 2**8 else "<u2" if top < 2**16 else "<i4" if top < 2**31 else "<i8"


class DocumentRows(Sequence[Ids]):
    """Documents cut into adjacent rows, which are read on access."""

    def __init__(self, documents: Documents, length: int) -> None:
        self._documents, self._length = documents, length
        self._ends = np.cumsum(-(-documents.sizes // length))

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """For each document, the number of the row that follows its last row."""
        return self._ends

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """The number of tokens in each row."""
        found = np.full(len(self), self._length, dtype=np.int64)
        found[self._ends - 1] = (self._documents.sizes - 1) % self._length + 1
        return found

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return int(self._documents.sizes.sum())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"the index of a row must be from 0 to {len(self) - 1}, got {index}")
        index %= len(self)
        document = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[document - 1]) if document else 0)
        return self._documents.crop(document, place * self._length, self._length)


def load_array(path: Path) -> tuple[FileArray, npt.NDArray[np.int64]]:
    """Open a `.npy` file, and return its ids as a flat array and the ends of its documents."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic.startswith(b"PK"):
            raise ValueError(
                "the file is an .npz archive of several arrays; save one of the arrays with np.save"
            )
        if magic != _MAGIC:
            raise ValueError("the first bytes are not those of a .npy file; save the array with np.save")
        # Memory-mapping checks the header against the size of the file.
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a .npy file: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"{path} must hold a non-empty array of integers, of shape [n] or [rows, n], got {array.dtype} "
            f"of shape {list(array.shape)}"
        )
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{path} must be in C order; save it again with np.save(FILE, np.ascontiguousarray(ARRAY))"
        )
    ids = FileArray(path, array.dtype, array.offset, array.size)
    rows = array.shape[0] if array.ndim == 2 else 1
    return ids, np.arange(1, rows + 1) * (array.size // rows)
