"""Read a state dict from a file in the format of safetensors or torch, or write one as safetensors.

No other module reads torch's format, which is a pickle. `weights_only` allows only tensors and plain
containers, so that the file cannot run code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# Parts of names that wrappers of a model or a module add: DistributedDataParallel and AveragedModel,
# torch.compile, activation checkpointing, FSDP.
_INSIDE = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# Parts that Lightning adds. They can also be part of other names, so they are removed only
# if every name then begins with one of `_ROOTS`.
_LIGHTNING = {"_forward_module", "model"}
_ROOTS = {
    "net", "token_critic", "null_embed", "to_self_cond", "token_emb", "pos_emb", "attn_layers", "to_logits"
}  # fmt: skip
_AVERAGE, _TRAINED = "ema_model", "online_model"  # of ema_pytorch, which can store both
_COUNTERS = {"initted", "step", "n_averaged"}  # stored with an average


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, by name, onto the CPU. Parts of names that wrappers add are removed.

    If the file holds the trained weights and their moving average (ema_pytorch), the average is read. Raises
    ValueError if the file is not a state dict, and OSError if it cannot be read.
    """
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    strange = [
        name for name, value in found.items() if not (isinstance(value, Tensor) and isinstance(name, str))
    ]
    if strange or not found:
        names = ", ".join(map(repr, strange[:5])) or "nothing"
        raise ValueError(
            f"{path}: must hold only tensors by name, as torch.save(model.state_dict(), …) writes them, got "
            f"{names}"
        )
    return _unwrapped(path, found)


def _unwrapped(path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: name.split(".") for name in found}
    averaged = "n_averaged" in found or any(_AVERAGE in each for each in parts.values())
    if averaged:
        parts = {n: each for n, each in parts.items() if _TRAINED not in each and each[-1] not in _COUNTERS}
    added = _INSIDE | {_AVERAGE}
    if all(_without(each, added | _LIGHTNING).partition(".")[0] in _ROOTS for each in parts.values()):
        added |= _LIGHTNING
    unwrapped: dict[str, Tensor] = {}
    for name, each in parts.items():
        plain = _without(each, added) or name
        if plain in unwrapped and not torch.equal(unwrapped[plain], found[name]):
            raise ValueError(
                f"{path}: holds {plain} twice with different values (the second is {name}); save the state "
                "dict of one model"
            )
        unwrapped[plain] = found[name]
    return unwrapped


def _without(parts: list[str], added: set[str]) -> str:
    return ".".join(part for part in parts if part not in added)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a new safetensors file, then rename it to `path`. Raises OSError."""
    draft = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, draft)
        draft.rename(path)
    except SafetensorError as error:
        raise OSError(0, str(error), str(path)) from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}); copy the file again if it is damaged"
        ) from error


def _torch(path: Path) -> dict[str, Tensor]:
    path.open("rb").close()  # raises OSError if it is not a readable file
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can cause errors of pickle, zip and torch
        raise ValueError(
            f"{path}: cannot be read with weights_only=True ({type(error).__name__}): it is damaged, or "
            "holds objects that are not tensors, which are not loaded because they could run code; write it "
            "again with torch.save(model.state_dict(), …), or as .safetensors"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: must hold a state dict, got {type(found).__name__}; save model.state_dict()"
        )
    return found
