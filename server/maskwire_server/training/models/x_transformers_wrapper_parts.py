"""The parts of a state dict of a `NonAutoregressiveWrapper`, and what they show about the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from maskwire_server.config import PRESETS, ModelConfig, ObjectiveConfig
from maskwire_server.training.models.x_transformers_names import Tensors


@dataclass(frozen=True)
class Imported:
    """An imported model: its settings, the settings of its objective, and its weights."""

    model: ModelConfig
    objective: ObjectiveConfig
    weights: dict[str, Tensor]
    """The weights by their names in `Networks`, in the types that they have there."""


@dataclass(frozen=True)
class Parts:
    """The parts of a state dict: the network, the weights of self-conditioning, and the critic."""

    net: dict[str, Tensor]
    where: str
    """The prefix of the names of `net` in the file."""
    conditioning: dict[str, Tensor]
    critic: dict[str, Tensor]
    critic_kind: Literal["none", "self", "token"]


def objective_of(parts: Parts) -> dict[str, Any]:
    """The settings of [objective] that the parts of a state dict show."""
    shown: dict[str, Any] = {"self_cond": bool(parts.conditioning), "critic": parts.critic_kind}
    if parts.conditioning:
        shown["self_cond_start"] = "none"  # x-transformers does not condition the first pass
    return shown


def with_objective(parts: Parts, objective: ObjectiveConfig) -> ObjectiveConfig:
    """Return [objective] with what the parts show. The user's settings apply to everything else."""
    unsaid: dict[str, Any] = {}
    if parts.conditioning:
        # The weights do not show how often training ran the first pass. The default is x-transformers' own.
        unsaid["self_cond_prob"] = PRESETS["x-transformers"]["self_cond_prob"]
    return ObjectiveConfig(**{**unsaid, **said(objective), **objective_of(parts)})


def said(section: ModelConfig | ObjectiveConfig) -> dict[str, Any]:
    """The settings that the user gave in a section, without defaults."""
    return {key: getattr(section, key) for key in section.model_fields_set}


def contradictions(name: str, settings: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    """One line of error text for each setting that differs from what the state dict shows."""
    return [
        f"{name}.{key} is {settings[key]!r} in the configuration, {value!r} in the state dict; remove it "
        "from the configuration"
        for key, value in shown.items()
        if key in settings and settings[key] != value
    ]


def take_apart(tensors: Tensors, *, integers: bool = False) -> Parts:
    """Split a state dict into its parts, by the names of its tensors. Raises ValueError.

    With `integers`, the state dict may have buffers of integers, which the built-in encoder does not have.
    """
    strange = [
        name
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() or (integers and not tensor.is_complex()))
        or (not tensor.ndim and name.endswith("emb.weight"))
        or tensor.layout is not torch.strided
    ]
    if strange:
        found = tensors[strange[0]]
        what = f"{found.dtype} of shape {tuple(found.shape)}"
        raise ValueError(
            f"{strange[0]} must be a dense floating-point tensor, and not a scalar if it is an embedding, "
            f"got {what}"
        )
    odd = [name for name, tensor in tensors.items() if not _finite(tensor.float())]
    if odd:
        others = len(odd) - 1
        words = f" and {others} other tensor{'s' * (others != 1)} contain" if others else " contains"
        raise ValueError(f"{odd[0]}{words} non-finite values; import weights from before they diverged")
    if not any(name.startswith("net.") for name in tensors):
        return Parts(dict(tensors), "", {}, {}, "none")
    net = under(tensors, "net.")
    critic = under(tensors, "token_critic.")
    conditioning = {n: tensors[n] for n in ("null_embed", "to_self_cond.weight") if n in tensors}
    known = {"null_embed", "to_self_cond.weight"}
    unknown = [n for n in tensors if not n.startswith(("net.", "token_critic.")) and n not in known]
    if unknown:
        raise ValueError(
            "\n".join(f"{name} is not a weight of a NonAutoregressiveWrapper; remove it" for name in unknown)
        )
    if len(conditioning) == 1:
        missing = (known - conditioning.keys()).pop()
        raise ValueError(f"{missing} is missing; self-conditioning needs null_embed and to_self_cond.weight")
    kind: Literal["none", "self", "token"] = "none"
    if critic:
        kind = "self" if critic.keys() & {"to_logits.bias"} else "token"
    if kind == "self":
        for name, tensor in under(critic, "net.").items():
            if name not in net or not torch.equal(net[name], tensor):
                raise ValueError(
                    f"token_critic.net.{name} differs from net.{name}, but a self critic must have the trunk "
                    "of the generator"
                )
        critic = {name: tensor for name, tensor in critic.items() if not name.startswith("net.")}
        if critic.keys() != {"to_logits.weight", "to_logits.bias"}:
            names = ", ".join(f"token_critic.{name}" for name in sorted(critic))
            raise ValueError(f"a self critic must have only to_logits.weight and to_logits.bias, got {names}")
    return Parts(net, "net.", conditioning, critic, kind)


def under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
