"""A hash of what data holds, fast for data of any size and the same however the ids are kept."""

from __future__ import annotations

import hashlib

import numpy as np

from maskwire.data.documents import Documents, narrowest

_ALL = 2**24  # ids; data that has more is sampled
_BLOCKS, _BLOCK = 2**12, 2**12


def content(documents: Documents) -> str:
    """The hash of every document's size, and of all ids or of blocks spread evenly over them."""
    digest = hashlib.sha256(documents.sizes.astype("<i8").tobytes())
    total = int(documents.sizes.sum())
    if total <= _ALL:
        for index in range(len(documents)):
            for ids in documents.chunks(index):
                _add(digest, ids)
        return f"sha256:{digest.hexdigest()}"
    ends = np.cumsum(documents.sizes)
    for place in np.linspace(0, total - 1, _BLOCKS).astype(np.int64):
        index = int(np.searchsorted(ends, place, side="right"))
        size = int(documents.sizes[index])
        start = int(place) - (int(ends[index]) - size)
        # The last ids of a document count too.
        _add(digest, documents.crop(index, max(0, min(start, size - _BLOCK)), _BLOCK))
    return f"sha256:{digest.hexdigest()}"


def _add(digest: hashlib._Hash, ids: np.ndarray) -> None:
    kind = narrowest(int(ids.max()))
    digest.update(kind.encode())
    digest.update(np.ascontiguousarray(ids, dtype=kind).data)
