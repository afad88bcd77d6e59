"""The trainer's state in memory and in files. All files are safetensors, which cannot run code.

model.safetensors       generator.* and critic.*: weights, and buffers that belong to the state
frozen.safetensors      the weights that are never trained; this file is the same in each checkpoint
ema.safetensors         the same names, if the run keeps a moving average
optimizer.safetensors   generator.* and critic.*: the optimizer's state and the number of updates

Several ranks may save their parts of these files instead: see `shards`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from maskwire_server.errors import StateLost
from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES
from maskwire_server.training import checkpoint_tensors, module_state
from maskwire_server.training.checkpoint_tensors import SavedTensors
from maskwire_server.training.optimizers import Group
from maskwire_server.training.ranks_interface import Ranks, assign, whole
from maskwire_server.training.shards import Piece, Shards, save

MODEL_FILE, EMA_FILE = WEIGHT_FILES
OPTIMIZER_FILE = "optimizer.safetensors"
_FIXED = "; optimizer.name and the parameters that optimizer.groups freezes must be as when it was saved"

Files = dict[str, dict[str, Tensor]]
"""Tensors by file and name."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the whole state in host memory."""

    files: Files

    def write(self, folder: Path) -> None:
        """Write the files to `folder`, except frozen weights that are already there. Raises OSError."""
        for path in checkpoint_tensors.files_of(folder, FROZEN_FILE):
            if path.name != FROZEN_FILE:  # in parts, as ranks write it
                path.unlink()
        for file, tensors in self.files.items():
            if file == FROZEN_FILE and _has(folder / file, tensors):
                continue
            (folder / file).unlink(missing_ok=True)
            save(tensors, folder / file)


def _has(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a file has tensors of exactly these names.

    In one run, frozen weights of the same name have the same values.
    """
    return path.exists() and checkpoint_tensors.find([path], path.name).keys() == tensors.keys()


class Copier:
    """Copies the state to host memory, and uses the same memory for the next copy.

    Copying to new memory takes up to twice as long, because the operating system has to provide the pages
    (P9 in docs/benchmarks.md).
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._frozen: dict[str, Tensor] | None = None
        self._frozen_pieces: dict[str, Piece] | None = None
        self._last: weakref.ref[Snapshot | Shards] | None = None

    def copy(self, files: Files) -> Snapshot:
        """Copy the live tensors to host memory. Training may continue when this returns.

        If an earlier snapshot is still in use, the copy gets new memory. With several ranks, the leader gets
        the whole state. The other ranks help to gather it, and get empty tensors.
        """
        self._renew()
        if self._frozen is None:  # these never change
            self._frozen = {name: self._gathered(each) for name, each in files.get(FROZEN_FILE, {}).items()}
        snapshot = Snapshot(
            {
                file: self._frozen
                if file == FROZEN_FILE
                else {name: self._whole((file, name), tensor) for name, tensor in tensors.items()}
                for file, tensors in files.items()
            }
        )
        self._last = weakref.ref(snapshot)
        return snapshot

    def copy_shards(self, files: Files) -> Shards:
        """Copy those parts of the live tensors that this rank saves to host memory."""
        self._renew()
        if self._frozen_pieces is None:
            self._frozen_pieces = self._pieces(files.get(FROZEN_FILE, {}))
        pieces = {
            file: self._frozen_pieces
            if file == FROZEN_FILE
            else {
                name: replace(piece, tensor=self._copied((file, name), piece.tensor))
                for name, piece in self._pieces(tensors).items()
            }
            for file, tensors in files.items()
        }
        names = {file: frozenset(tensors) for file, tensors in files.items()}
        shards = Shards(self._ranks.rank, pieces, names)
        self._last = weakref.ref(shards)
        return shards

    def _renew(self) -> None:
        if self._last is not None and self._last() is not None:
            self._buffers = {}

    def _gathered(self, live: Tensor) -> Tensor:
        full = whole(live.detach())
        return full if self._ranks.is_leader else full.new_empty(0)

    def _whole(self, key: tuple[str, str], live: Tensor) -> Tensor:
        full = self._gathered(live)
        return self._copied(key, full) if self._ranks.is_leader else full

    def _pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        found = {
            name: self._ranks.piece(live.detach(), number)
            for number, (name, live) in enumerate(tensors.items())
        }
        return {name: piece for name, piece in found.items() if piece is not None}

    def _copied(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        if key not in self._buffers or self._buffers[key].shape != tensor.shape:
            self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._buffers[key].copy_(tensor)


def live_tensors(groups: Mapping[str, Group]) -> Files:
    """The tensors of the trainer's state, by file and name. They are those in use, not copies."""
    files: Files = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    for group_name, group in groups.items():
        for name, weight in zip(group.names, group.weights, strict=True):
            files[MODEL_FILE][f"{group_name}.{name}"] = weight
        for name, buffer in group.buffers.items():
            files[MODEL_FILE][f"{group_name}.{name}"] = buffer
        for name, weight in group.frozen.items():
            files.setdefault(FROZEN_FILE, {})[f"{group_name}.{name}"] = weight
        for name, value in group.state().items():
            files[OPTIMIZER_FILE][f"{group_name}.{name}"] = value
        if group.ema is not None:
            averages = files.setdefault(EMA_FILE, {})
            averages |= {f"{group_name}.{name}": weight for name, weight in group.averages().items()}
            averages |= {f"{group_name}.{name}": b for name, b in module_state.buffers(group.ema).items()}
    return files


@dataclass(frozen=True)
class SavedState:
    """A checkpoint whose tensors fit the trainer. The tensors are read one at a time."""

    files: dict[str, SavedTensors]
    has_average: bool
    """Whether the checkpoint has a moving average; otherwise the average starts from the weights."""
    is_untrained: bool
    """Whether the checkpoint is from before the first update. The state of any optimizer is then zeros."""

    def tensor(self, file: str, name: str, like: Tensor) -> Tensor:
        """Read the saved tensor for the live tensor `like`, whole. Raises ValueError if that fails."""
        if file == OPTIMIZER_FILE and self.is_untrained:
            return torch.zeros(like.shape, dtype=like.dtype)
        return self.files[file][name].read()


def read(folder: Path, groups: Mapping[str, Group]) -> SavedState:
    """Find the tensors of a checkpoint that one process or several ranks saved.

    A checkpoint from before the first update fits every optimizer. Raises ValueError if the checkpoint does
    not fit `groups`: it names the first file or tensor that is missing, unknown, or of another shape or type.
    """
    live = live_tensors(groups)
    optimizer = _found(folder, OPTIMIZER_FILE)
    counts = [int(tensor.read()) for name, tensor in optimizer.items() if name.endswith(".updates")]
    untrained = bool(counts) and not any(counts)
    if untrained or not checkpoint_tensors.files_of(folder, EMA_FILE):
        live.pop(EMA_FILE, None)
    found = _find_weights(folder, live)
    if not untrained:
        found[OPTIMIZER_FILE] = _fitting(OPTIMIZER_FILE, optimizer, live[OPTIMIZER_FILE], _FIXED)
    if EMA_FILE in live:
        found[EMA_FILE] = _fitting(EMA_FILE, _found(folder, EMA_FILE), live[EMA_FILE])
    return SavedState(found, EMA_FILE in live, untrained)


def load(saved: SavedState | None, groups: Mapping[str, Group], ranks: Ranks) -> None:
    """Copy the tensors of a checkpoint that `read` found into the groups.

    With several ranks, the leader passes `saved` and sends the tensors to the other ranks, which pass None.
    Raises StateLost if a file can no longer be read.
    """
    live = live_tensors(groups)
    has_average = torch.tensor(int(saved is not None and saved.has_average))
    if not int(ranks.share(has_average, has_average)):
        live.pop(EMA_FILE, None)
    try:
        with torch.no_grad():
            for file, tensors in live.items():
                for name, tensor in tensors.items():
                    given = None if saved is None else saved.tensor(file, name, tensor)
                    assign(tensor, ranks.share(given, tensor))
    except ValueError as error:
        raise StateLost(f"only a part of the checkpoint could be loaded: {error}; check the disk") from error
    for name, group in groups.items():
        if EMA_FILE in live:
            group.copy_frozen_to_average()
        else:
            group.begin_average()
        group.updates = int(live[OPTIMIZER_FILE][f"{name}.updates"])


def _found(folder: Path, file: str) -> SavedTensors:
    paths = checkpoint_tensors.files_of(folder, file)
    return checkpoint_tensors.find(paths or [folder / file], file)


def _find_weights(folder: Path, live: Files) -> dict[str, SavedTensors]:
    """Find the saved weights and buffers, by the file to which they belong now.

    Weights that are frozen now may have been trained when they were saved. Raises ValueError if the file of
    frozen weights has other weights than those that are frozen now.
    """
    files = [file for file in (MODEL_FILE, FROZEN_FILE) if file in live]
    saved = dict(_found(folder, MODEL_FILE))
    if checkpoint_tensors.files_of(folder, FROZEN_FILE):
        kept = _found(folder, FROZEN_FILE)
        if kept.keys() != live.get(FROZEN_FILE, {}).keys():  # later checkpoints link the same file
            raise ValueError(f"{FROZEN_FILE}: does not hold exactly the weights that are frozen now{_FIXED}")
        saved |= kept
    wanted = {name: tensor for file in files for name, tensor in live[file].items()}
    found = _fitting(MODEL_FILE, saved, wanted)
    return {file: {name: found[name] for name in live[file]} for file in files}


def _fitting(file: str, tensors: SavedTensors, live: dict[str, Tensor], hint: str = "") -> SavedTensors:
    """Return `tensors` if they have the names, shapes and types of the live ones, or raise ValueError."""
    for name in sorted(live.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{file}: the tensor {name} is missing{hint}")
        if name not in live:
            raise ValueError(f"{file}: the tensor {name} is not part of this model{hint}")
        found, wanted = tensors[name], live[name]
        if found.shape != tuple(wanted.shape) or found.dtype != wanted.dtype:
            raise ValueError(
                f"{file}: the tensor {name} must be {wanted.dtype} of shape {tuple(wanted.shape)}, "
                f"got {found.dtype} of shape {found.shape}"
            )
    return tensors
