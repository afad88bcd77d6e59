"""The tensors that make up a module's state, each once: its weights and its persistent buffers."""

from __future__ import annotations

from torch import Tensor, nn


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module, by name. A tied parameter appears once, under its first name."""
    return dict(module.named_parameters())


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a module, by name."""
    others = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in others}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights and persistent buffers of a module, by name."""
    return weights(module) | buffers(module)


def load(module: nn.Module, found: dict[str, Tensor]) -> None:
    """Copy tensors into a module by name. Raises ValueError, naming the first tensor that does not fit."""
    live = tensors(module)
    for name in sorted(live.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
        if name not in live:
            raise ValueError(f"the tensor {name} is not part of this model")
        if found[name].shape != live[name].shape:
            raise ValueError(
                f"the tensor {name} must have shape {tuple(live[name].shape)}, got {tuple(found[name].shape)}"
            )
    for name, tensor in found.items():
        live[name].data.copy_(tensor)
