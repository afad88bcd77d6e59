"""The parts of the state that one rank saves, in files of its own.

    model-r0002-001.safetensors     the first file of rank 2 with parts of the weights

A file has whole tensors or consecutive rows of them, under names such as `model/generator.…` and `ema/…`.
The file's metadata says where the rows begin, in the format of torch's distributed checkpoints: torch's
`HuggingFaceStorageReader` can also read a folder of these files.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maskwire_server import failpoints
from maskwire_server.results import FROZEN_FILE

SHARDING = "DCP_SHARDING_INFO"
"""The key of a file's metadata that says where each tensor begins: torch's name for it."""
OFFSETS, WHOLE = "saved_offsets", "whole_shape"
MAX_FILE_BYTES = 2**30 - 2**24
"""The most bytes of tensors in one file. With its header, the file has at most 1 GiB."""


@dataclass(frozen=True)
class Piece:
    """A tensor, or consecutive rows of it."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor. Only the first number may differ from 0."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""


Pieces = Mapping[str, Mapping[str, Piece]]
"""Pieces by the file of whole tensors to which they belong, and by name."""


@dataclass(frozen=True)
class Shards:
    """A copy, in host memory, of the parts of the state that a rank saves."""

    rank: int
    pieces: Pieces
    names: Mapping[str, frozenset[str]]
    """The names of all tensors of the state by file, whichever rank saves them."""

    def write(self, folder: Path, *, with_frozen: bool) -> list[str]:
        """Write files of at most `MAX_FILE_BYTES` to `folder`, and return their names. Raises OSError."""
        written = []
        for whole_file, pieces in self.pieces.items():
            if whole_file == FROZEN_FILE and not with_frozen:
                continue
            kind = Path(whole_file).stem
            for number, part in enumerate(_files(pieces), 1):
                name = f"{kind}-r{self.rank:04d}-{number:03d}.safetensors"
                sharding = {
                    f"{kind}/{key}": {OFFSETS: piece.offsets, WHOLE: piece.shape}
                    for key, piece in part.items()
                }
                tensors = {f"{kind}/{key}": piece.tensor.contiguous() for key, piece in part.items()}
                failpoints.passing("shard.writing")
                save(tensors, folder / name, {SHARDING: json.dumps(sharding)})
                written.append(name)
        failpoints.passing("shard.written")
        return written


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file. Raises OSError."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        text = os.strerror(number) if found else str(error)
        raise OSError(number, text, str(path)) from error


def _files(pieces: Mapping[str, Piece]) -> Iterator[dict[str, Piece]]:
    """Distribute the pieces among files. A piece that is too large for one file is divided."""
    part: dict[str, Piece] = {}
    size = 0
    for name, piece in pieces.items():
        for small in _divided(piece):
            if name in part or (part and size + small.tensor.nbytes > MAX_FILE_BYTES):
                yield part
                part, size = {}, 0
            part[name] = small
            size += small.tensor.nbytes
    if part:
        yield part


def _divided(piece: Piece) -> Iterator[Piece]:
    tensor = piece.tensor
    if tensor.nbytes <= MAX_FILE_BYTES or not tensor.ndim:
        yield piece
        return
    rows = max(1, MAX_FILE_BYTES * len(tensor) // tensor.nbytes)
    for start in range(0, len(tensor), rows):
        offsets = (piece.offsets[0] + start, *piece.offsets[1:])
        yield Piece(tensor[start : start + rows], offsets, piece.shape)
