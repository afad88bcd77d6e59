"""The trainer's state in memory and in files. All files are safetensors, so a foreign file can run no code.

model.safetensors       generator.* and critic.*: weights, and buffers that belong to the state
frozen.safetensors      the same for weights that are never trained; the same file in each checkpoint
ema.safetensors         the same names, if the run keeps a moving average
optimizer.safetensors   generator.* and critic.*: the optimizer's state and the number of updates
"""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES
from maskwire_server.training import module_state
from maskwire_server.training.optim import Group
from maskwire_server.training.ranks import Ranks, assign, whole

MODEL_FILE, EMA_FILE = WEIGHT_FILES
OPTIMIZER_FILE = "optimizer.safetensors"
_FIXED = "; optimizer.name and what optimizer.groups freezes must be as when it was saved"

Files = dict[str, dict[str, Tensor]]
"""Tensors by file and name."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state in host memory."""

    files: Files

    def write(self, folder: Path) -> None:
        """Write the files to `folder`, but a file of frozen weights that is there. Raises OSError."""
        for file, tensors in self.files.items():
            if file == FROZEN_FILE and _has(folder / file, tensors):
                continue
            (folder / file).unlink(missing_ok=True)
            try:
                save_file(tensors, folder / file)
            except SafetensorError as error:
                found = re.search(r"os error (\d+)", str(error))
                number = int(found[1]) if found else errno.EIO
                text = os.strerror(number) if found else str(error)
                raise OSError(number, text, str(folder / file)) from error


def _has(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a file has tensors of these names. Frozen weights of one run differ in nothing else."""
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return set(file.keys()) == tensors.keys()


class Copier:
    """Copies the state to host memory, and uses the same memory for the next copy.

    Copying to new memory takes up to twice as long, because the operating system has to provide the pages
    (P9 in docs/benchmarks.md).
    """

    def __init__(self, *, keeps: bool = True) -> None:
        """Only the leader of several ranks keeps what it copies; the others take part in gathering it."""
        self._keeps = keeps
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._frozen: dict[str, Tensor] | None = None
        self._last: weakref.ref[Snapshot] | None = None

    def copy(self, files: Files) -> Snapshot:
        """Copy live tensors. Training may continue at once.

        While an earlier snapshot is in use, its memory is left alone and the copy gets new memory.
        """
        if self._last is not None and self._last() is not None:
            self._buffers = {}
        if self._frozen is None:  # these never change
            self._frozen = {name: self._gathered(each) for name, each in files.get(FROZEN_FILE, {}).items()}
        snapshot = Snapshot(
            {
                file: self._frozen
                if file == FROZEN_FILE
                else {name: self._copied((file, name), tensor) for name, tensor in tensors.items()}
                for file, tensors in files.items()
            }
        )
        self._last = weakref.ref(snapshot)
        return snapshot

    def _gathered(self, live: Tensor) -> Tensor:
        full = whole(live.detach())
        return full if self._keeps else full.new_empty(0)

    def _copied(self, key: tuple[str, str], live: Tensor) -> Tensor:
        full = self._gathered(live)
        if not self._keeps:
            return full
        if key not in self._buffers:
            self._buffers[key] = torch.empty(full.shape, dtype=full.dtype)
        return self._buffers[key].copy_(full)


def live_tensors(groups: Mapping[str, Group]) -> Files:
    """The tensors that make up the state: those in use, not copies."""
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
    """The tensors of a checkpoint that fit the groups, whole and in host memory."""

    files: Files
    has_average: bool
    """Whether it has a moving average; otherwise the average starts from the weights."""


def read(folder: Path, groups: Mapping[str, Group]) -> SavedState:
    """Read the files of a snapshot.

    A snapshot from before the first update fits every optimizer. Raises ValueError that names the first file
    or tensor that is missing, unknown, or of another shape or type.
    """
    live = live_tensors(groups)
    optimizer = _tensors(folder / OPTIMIZER_FILE)
    counts = [int(tensor) for name, tensor in optimizer.items() if name.endswith(".updates")]
    untrained = bool(counts) and not any(counts)
    if untrained or not (folder / EMA_FILE).exists():
        live.pop(EMA_FILE, None)
    found = _read_weights(folder, live)
    if untrained:  # zeros, whichever optimizer it was saved with
        zeros = {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in live[OPTIMIZER_FILE].items()}
        found[OPTIMIZER_FILE] = zeros
    else:
        found[OPTIMIZER_FILE] = _fitting(OPTIMIZER_FILE, optimizer, live[OPTIMIZER_FILE], _FIXED)
    if EMA_FILE in live:
        found[EMA_FILE] = _fitting(EMA_FILE, _tensors(folder / EMA_FILE), live[EMA_FILE])
    return SavedState(found, EMA_FILE in live)


def load(saved: SavedState | None, groups: Mapping[str, Group], ranks: Ranks) -> None:
    """Load a state that was read into the groups.

    Of several ranks only the leader has read it, and gives the others their parts: None.
    """
    live = live_tensors(groups)
    has_average = torch.tensor(int(saved is not None and saved.has_average))
    if not int(ranks.share(has_average, has_average)):
        live.pop(EMA_FILE, None)
    with torch.no_grad():
        for file, tensors in live.items():
            for name, tensor in tensors.items():
                given = None if saved is None else saved.files[file][name]
                assign(tensor, ranks.share(given, tensor))
    for name, group in groups.items():
        if EMA_FILE not in live:
            group.begin_average()
        group.updates = int(live[OPTIMIZER_FILE][f"{name}.updates"])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: cannot be read as safetensors: {error}") from error


def _read_weights(folder: Path, live: Files) -> Files:
    """The weights by file, whichever of them were frozen when they were saved."""
    files = [file for file in (MODEL_FILE, FROZEN_FILE) if file in live]
    saved = _tensors(folder / MODEL_FILE)
    if (folder / FROZEN_FILE).exists():
        kept = _tensors(folder / FROZEN_FILE)
        if kept.keys() != live.get(FROZEN_FILE, {}).keys():  # later checkpoints link the same file
            raise ValueError(f"{FROZEN_FILE}: holds other weights than those that are frozen now{_FIXED}")
        saved |= kept
    wanted = {name: tensor for file in files for name, tensor in live[file].items()}
    found = _fitting(MODEL_FILE, saved, wanted)
    return {file: {name: found[name] for name in live[file]} for file in files}


def _fitting(
    file: str, tensors: dict[str, Tensor], live: dict[str, Tensor], hint: str = ""
) -> dict[str, Tensor]:
    """The tensors, if they have the names, shapes and types of the live ones; otherwise ValueError."""
    for name in sorted(live.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{file}: {name} is missing{hint}")
        if name not in live:
            raise ValueError(f"{file}: {name} is not part of this model{hint}")
        found, wanted = tensors[name], live[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"{file}: {name} must be {wanted.dtype} {tuple(wanted.shape)}, "
                f"got {found.dtype} {tuple(found.shape)}"
            )
    return tensors
