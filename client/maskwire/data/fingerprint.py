"""A hash of the content of data, which is fast at any size and does not depend on how ids are stored."""

from __future__ import annotations

import hashlib

import numpy as np

from maskwire.data.token_documents import Documents, narrowest

_MAX_HASHED = 2**24  # ids; larger data is sampled
_BLOCKS, _BLOCK = 2**12, 2**12  # blocks, ids per block


def content_hash(documents: Documents) -> str:
    """Hash the size of every document, and the ids; of more than 2^24 ids, only evenly spread blocks."""
    digest = hashlib.sha256(documents.sizes.astype("<i8").tobytes())
    total = int(documents.sizes.sum())
    if total <= _MAX_HASHED:
        for index in range(len(documents)):
            for ids in documents.chunks(index):
                _add(digest, ids)
        return f"sha256:{digest.hexdigest()}"
    ends = np.cumsum(documents.sizes)
    for place in np.linspace(0, total - 1, _BLOCKS).astype(np.int64):
        index = int(np.searchsorted(ends, place, side="right"))
        size = int(documents.sizes[index])
        start = int(place) - (int(ends[index]) - size)
        # A block that would pass the end of the document starts earlier.
        _add(digest, documents.crop(index, max(0, min(start, size - _BLOCK)), _BLOCK))
    return f"sha256:{digest.hexdigest()}"


def _add(digest: hashlib._Hash, ids: np.ndarray) -> None:
    kind = narrowest(int(ids.max()))
    digest.update(kind.encode())
    digest.update(np.ascontiguousarray(ids, dtype=kind).data)
