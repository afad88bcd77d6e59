"""The trainer's state to and from files: safetensors alone, so that a foreign file can run no code.

model.safetensors       generator.* and critic.*
ema.safetensors         the same names, if a moving average is kept
optimizer.safetensors   generator.* and critic.*: AdamW's state and the count of updates
"""

from __future__ import annotations

import errno
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state in host memory: file name -> tensors."""

    files: dict[str, dict[str, Tensor]]

    def write(self, folder: Path) -> None:
        """Write the files into `folder`. Raises OSError."""
        for file, tensors in self.files.items():
            try:
                save_file(tensors, folder / file)
            except SafetensorError as error:
                said = re.search(r"os error (\d+)", str(error))
                number = int(said[1]) if said else errno.EIO
                raise OSError(
                    number, os.strerror(number) if said else str(error), str(folder / file)
                ) from error


class Copier:
    """Copies a trainer's state into host memory that is kept for the next copy.

    Fresh memory can take as long as the copy once more, while the system hands its pages out (P9 in
    docs/benchmarks.md).
    """

    def __init__(self) -> None:
        self._room: dict[tuple[str, str], Tensor] = {}
        self._last: weakref.ref[Snapshot] | None = None

    def copy(self, files: dict[str, dict[str, Tensor]]) -> Snapshot:
        """Copy live tensors; training may go on at once. A snapshot that is still held stays as it is."""
        if self._last is not None and self._last() is not None:
            self._room = {}
        snapshot = Snapshot(
            {
                file: {name: self._copied((file, name), tensor) for name, tensor in tensors.items()}
                for file, tensors in files.items()
            }
        )
        self._last = weakref.ref(snapshot)
        return snapshot

    def _copied(self, key: tuple[str, str], live: Tensor) -> Tensor:
        if key not in self._room:
            self._room[key] = torch.empty(live.shape, dtype=live.dtype)
        return self._room[key].copy_(live.detach())


def load(folder: Path, live: dict[str, dict[str, Tensor]]) -> None:
    """Copy the files of `folder` into live tensors; nothing is copied unless everything fits.

    Raises ValueError naming the first file or tensor that is missing, unknown or of another kind.
    """
    loaded = {file: _read(folder / file, tensors) for file, tensors in live.items()}
    with torch.no_grad():
        for file, tensors in live.items():
            for name, tensor in tensors.items():
                tensor.copy_(loaded[file][name])


def _read(path: Path, live: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: cannot be read: {error}") from error
    for name in sorted(live.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path.name}: {name} is missing")
        if name not in live:
            raise ValueError(f"{path.name}: {name} is not part of this model")
        found, wanted = tensors[name], live[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"{path.name}: {name} must be {wanted.dtype} {tuple(wanted.shape)}, "
                f"got {found.dtype} {tuple(found.shape)}"
            )
    return tensors
