"""A foreign state dict from a file: safetensors, or torch's format read without running its code.

The one place that reads torch's own format, which is a pickle: with `weights_only` nothing but tensors and
plain containers is built.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# What wrappers put into names, around the model or a part of it: DistributedDataParallel and AveragedModel,
# torch.compile, activation checkpointing, FSDP.
_INSIDE = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# Lightning's module and its strategy, in names that a wrapper without them may have too.
_LIGHTNING = {"_forward_module", "model"}
_ROOTS = {
    "net", "token_critic", "null_embed", "to_self_cond", "token_emb", "pos_emb", "attn_layers", "to_logits"
}  # fmt: skip
_AVERAGE, _TRAINED = "ema_model", "online_model"  # of ema_pytorch, which may hold both
_COUNTERS = {"initted", "step", "n_averaged"}  # beside an average


def read(path: Path) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, without what wrappers put into names.

    Of a moving average that is kept beside the trained weights (ema_pytorch) it is the average. Raises
    ValueError for a file that is no state dict, OSError for one that cannot be read.
    """
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    strange = [
        name for name, value in found.items() if not (isinstance(value, Tensor) and isinstance(name, str))
    ]
    if strange or not found:
        names = ", ".join(map(repr, strange[:5])) or "nothing"
        raise ValueError(
            f"{path}: must hold tensors by name alone, as torch.save(model.state_dict(), …) writes them; it "
            f"holds {names}"
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
                f"{path}: holds {plain} twice, with other values (the second is {name}); save the state dict "
                "of one model"
            )
        unwrapped[plain] = found[name]
    return unwrapped


def _without(parts: list[str], added: set[str]) -> str:
    return ".".join(part for part in parts if part not in added)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all. Raises OSError."""
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
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error


def _torch(path: Path) -> dict[str, Tensor]:
    path.open("rb").close()  # what is no file is said as such
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a foreign file: pickle's, zip's and torch's own
        raise ValueError(
            f"{path}: cannot be read with weights_only=True ({type(error).__name__}): it is damaged, or "
            "holds more than tensors, and what else it holds is never run; write it anew with "
            "torch.save(model.state_dict(), …), or as .safetensors"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: must hold a state dict, got {type(found).__name__}; save model.state_dict()"
        )
    return found
