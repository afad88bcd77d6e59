"""Finds the tensors of a checkpoint in the files that one or several ranks wrote, and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskwire.v1.values import unsharded_name
from maskwire_server.training.shards import OFFSETS, SHARDING, WHOLE

_TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """The place of a tensor, or of consecutive rows of a tensor, in one file."""

    path: Path
    key: str
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, stored in one file or in several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: tuple[_Stored, ...]
    """The parts of the tensor, in the order of their rows."""

    def read(self) -> Tensor:
        """Read the whole tensor into memory. Raises ValueError if a file cannot be read."""
        if len(self.stored) == 1:
            return _read(self.stored[0])
        whole = torch.empty(self.shape, dtype=self.dtype)
        for part in self.stored:
            whole[part.first : part.first + part.shape[0]] = _read(part)
        return whole


SavedTensors = Mapping[str, SavedTensor]
"""The tensors of a checkpoint, by name."""


def files_of(folder: Path, file: str) -> list[Path]:
    """The files in `folder` that hold the tensors of `file`: the file itself, or its shards."""
    return sorted(path for path in folder.glob("*.safetensors") if unsharded_name(path.name) == file)


def find(paths: Iterable[Path], file: str) -> dict[str, SavedTensor]:
    """Find the tensors of `file`, by name, in the files `paths`, which are the file itself or its shards.

    Raises ValueError that names a file that cannot be read, or rows that are missing or repeated.
    """
    kind = Path(file).stem
    found: dict[str, list[_Stored]] = {}
    wholes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                sharding: dict[str, Any] = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    shape, dtype = tuple(header.get_shape()), _TYPES[header.get_dtype()]
                    place = sharding.get(key)
                    first = place[OFFSETS][0] if place and shape else 0
                    whole = (tuple(place[WHOLE]) if place else shape, dtype)
                    name = key.removeprefix(f"{kind}/") if place else key
                    if wholes.setdefault(name, whole) != whole:
                        raise ValueError(
                            f"{path.name}: {name} must have the same shape and type as in the other files"
                        )
                    found.setdefault(name, []).append(_Stored(path, key, first, shape))
        except (SafetensorError, OSError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path.name}: cannot be read as safetensors: {error}") from error
    for name, parts in found.items():
        parts.sort(key=lambda part: part.first)
        _check_complete(file, name, wholes[name][0], parts)
    return {name: SavedTensor(*wholes[name], tuple(parts)) for name, parts in found.items()}


def _check_complete(file: str, name: str, shape: tuple[int, ...], parts: list[_Stored]) -> None:
    """Raise ValueError unless the parts contain each row of the tensor exactly once."""
    if not shape:
        if len(parts) > 1:
            raise ValueError(
                f"the tensor {name} must be in one file, but is in {parts[0].path.name} and "
                f"{parts[1].path.name}; use another checkpoint"
            )
        return
    row = 0
    for part in parts:
        if part.first < row:
            raise ValueError(
                f"{part.path.name}: {name} repeats rows from row {part.first} on, which another file holds"
            )
        if part.first > row:
            raise ValueError(
                f"rows {row} to {part.first - 1} of {name} are in none of the files {file}: the checkpoint "
                "is incomplete; use another"
            )
        if part.shape[1:] != shape[1:]:
            raise ValueError(
                f"{part.path.name}: rows of {name} must have shape {shape[1:]}, got {part.shape[1:]}"
            )
        row += part.shape[0]
    if row != shape[0]:
        raise ValueError(
            f"rows {row} to {shape[0] - 1} of {name} are in none of the files {file}: the checkpoint is "
            "incomplete; use another"
        )


def _read(part: _Stored) -> Tensor:
    try:
        with safe_open(part.path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(part.key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{part.path.name}: cannot be read as safetensors: {error}") from error
    return tensor


def read(tensors: SavedTensors) -> dict[str, Tensor]:
    """Read all tensors into memory, by name. Raises ValueError if a file cannot be read."""
    return {name: tensor.read() for name, tensor in tensors.items()}
