"""Import and export of weights of x-transformers.

They are those of a `NonAutoregressiveWrapper` or a `TransformerWrapper(Encoder)`.

Sizes, tied embeddings, critic and self-conditioning are read from the state dict. Settings that contradict it
are errors, and so are options that maskwire does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from maskwire_server.config import PRESETS, ModelConfig, ObjectiveConfig
from maskwire_server.training.models import x_transformers_options
from maskwire_server.training.models.encoder import x_transformers_names
from maskwire_server.training.models.networks import Networks

Gains = Literal["auto", "offset", "plain"]
Tensors = Mapping[str, Tensor]

# The settings of [model] and [objective] that the state dict determines.
_SHOWN = {
    "model": (
        "num_tokens", "max_seq_len", "dim", "depth", "heads", "dim_head", "ff_mult", "emb_dim", "positions",
        "norm", "feed_forward", "qk_norm", "tied_embeddings",
    ),
    "objective": ("self_cond", "self_cond_start", "critic"),
}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """An imported model."""

    model: ModelConfig
    objective: ObjectiveConfig
    weights: dict[str, Tensor]
    """By the names of `Networks`, fp32."""


@dataclass(frozen=True)
class _Parts:
    """The parts of a state dict."""

    net: dict[str, Tensor]
    where: str
    """The prefix of the names of `net` in the file."""
    conditioning: dict[str, Tensor]
    critic: dict[str, Tensor]
    critic_kind: Literal["none", "self", "token"]


def import_state_dict(
    tensors: Tensors, model: ModelConfig, objective: ObjectiveConfig, *, gains: Gains = "auto"
) -> Imported:
    """Import a state dict. In `model` and `objective`, only settings that the user set are compared with it.

    `gains` says whether the gains of the norms are gamma + 1 (offset: the default of x-transformers) or gamma
    (plain: norm_add_unit_offset=False and older versions). Raises ValueError with one line for each problem.
    """
    parts = _take_apart(tensors)
    shown_model = _sizes(parts.net, parts.where, model)
    shown_objective: dict[str, Any] = {"self_cond": bool(parts.conditioning), "critic": parts.critic_kind}
    unsaid: dict[str, Any] = {}
    if parts.conditioning:
        shown_objective["self_cond_start"] = "none"  # x-transformers does not condition the first pass
        # The weights do not show how often the first pass was taken. The default is that of x-transformers.
        unsaid["self_cond_prob"] = PRESETS["x-transformers"]["self_cond_prob"]
    problems = []
    if "mask_id" not in model.model_fields_set:
        problems.append(
            "model.mask_id must be set to the mask_id of the NonAutoregressiveWrapper: the state dict "
            "does not contain it"
        )
    for name, section, shown in (("model", model, shown_model), ("objective", objective, shown_objective)):
        said = {key: getattr(section, key) for key in _SHOWN[name] if key in section.model_fields_set}
        problems += [
            f"{name}.{key} is {value!r} in the configuration, {shown[key]!r} in the state dict; leave it out"
            for key, value in said.items()
            if key in shown and value != shown[key] and not (key == "emb_dim" and value == shown_model["dim"])
        ]
    if problems:
        raise ValueError("\n".join(problems))
    try:
        found = Imported(
            ModelConfig(**{**_said(model), **shown_model}),
            ObjectiveConfig(**{**unsaid, **_said(objective), **shown_objective}),
            {},
        )
    except ValidationError as error:
        lines = (f"model.{problem['msg'].removeprefix('Value error, ')}" for problem in error.errors())
        raise ValueError("\n".join(lines)) from error
    weights = _translate(parts, found)
    _shift_gains(weights, gains)
    return Imported(found.model, found.objective, weights)


def export_state_dict(model: ModelConfig, objective: ObjectiveConfig, weights: Tensors) -> dict[str, Tensor]:
    """Export weights as the state dict of a `NonAutoregressiveWrapper`.

    A self critic is exported without its copy of the generator's trunk, which loads with strict=False.
    Raises ValueError that names an option that x-transformers' default encoder does not have.
    """
    if model.heads == 1:
        raise ValueError("model.heads is 1, but x-transformers has no output projection for a single head")
    default = ModelConfig()
    for key in ("positions", "norm", "feed_forward", "qk_norm"):
        if getattr(model, key) != getattr(default, key):
            raise ValueError(
                f"model.{key} is {getattr(model, key)!r}, but x-transformers' default encoder has "
                f"{getattr(default, key)!r}"
            )
    found = _untranslate(weights, model, "generator.", "net.")
    if objective.self_cond:
        found["null_embed"] = weights["generator.null_embed"]
        found["to_self_cond.weight"] = weights["generator.to_self_cond.weight"]
    if objective.critic == "self":
        for part in ("weight", "bias"):
            found[f"token_critic.to_logits.{part}"] = weights[f"critic.{part}"]
    elif objective.critic == "token":
        found |= _untranslate(weights, _of_critic(model), "critic.", "token_critic.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _said(section: ModelConfig | ObjectiveConfig) -> dict[str, Any]:
    return {key: getattr(section, key) for key in section.model_fields_set}


def _of_critic(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"tied_embeddings": False})


def _take_apart(tensors: Tensors) -> _Parts:
    strange = [
        name
        for name, tensor in tensors.items()
        if not tensor.is_floating_point()
        or (not tensor.ndim and name.endswith("emb.weight"))
        or tensor.layout is not torch.strided
    ]
    if strange:
        found = tensors[strange[0]]
        what = f"{found.dtype} {tuple(found.shape)}"
        raise ValueError(
            f"{strange[0]} must be a dense floating-point tensor, embeddings not a scalar, got {what}"
        )
    odd = [name for name, tensor in tensors.items() if not _finite(tensor.float())]
    if odd:
        others = len(odd) - 1
        words = f" and {others} other tensor{'s' * (others != 1)} contain" if others else " contains"
        raise ValueError(f"{odd[0]}{words} non-finite values")
    if not any(name.startswith("net.") for name in tensors):
        return _Parts(dict(tensors), "", {}, {}, "none")
    net = _under(tensors, "net.")
    critic = _under(tensors, "token_critic.")
    conditioning = {n: tensors[n] for n in ("null_embed", "to_self_cond.weight") if n in tensors}
    known = {"null_embed", "to_self_cond.weight"}
    unknown = [n for n in tensors if not n.startswith(("net.", "token_critic.")) and n not in known]
    if unknown:
        raise ValueError(
            "\n".join(f"{name} is not a weight of a NonAutoregressiveWrapper" for name in unknown)
        )
    if len(conditioning) == 1:
        missing = (known - conditioning.keys()).pop()
        raise ValueError(f"{missing} is missing; self-conditioning needs null_embed and to_self_cond")
    kind: Literal["none", "self", "token"] = "none"
    if critic:
        kind = "self" if critic.keys() & {"to_logits.bias"} else "token"
    if kind == "self":
        for name, tensor in _under(critic, "net.").items():
            if name not in net or not torch.equal(net[name], tensor):
                raise ValueError(
                    f"token_critic.net.{name} differs from net.{name}, but a self critic shares the trunk of "
                    "the generator"
                )
        critic = {name: tensor for name, tensor in critic.items() if not name.startswith("net.")}
        if critic.keys() != {"to_logits.weight", "to_logits.bias"}:
            names = ", ".join(f"token_critic.{name}" for name in sorted(critic))
            raise ValueError(f"a self critic must have only to_logits.weight and to_logits.bias, got {names}")
    return _Parts(net, "net.", conditioning, critic, kind)


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _sizes(net: Tensors, where: str, said: ModelConfig) -> dict[str, Any]:
    """The settings of [model] for these weights. Raises ValueError for unsupported options."""
    lines = x_transformers_options.named(net, where)
    if lines:
        raise ValueError("\n".join(lines))
    needed = (
        "token_emb.emb.weight",
        "pos_emb.emb.weight",
        "attn_layers.final_norm.gamma",
        "attn_layers.layers.0.1.to_q.weight",
        "attn_layers.layers.1.1.ff.0.0.weight",
    )
    absent = [name for name in needed if name not in net]
    if len(absent) == len(needed):
        names = ", ".join(sorted(net)[:3])
        raise ValueError(
            f"these are not the weights of a TransformerWrapper(Encoder): none has its names, got {names}"
        )
    if absent:
        raise ValueError("\n".join(x_transformers_options.missing(absent, where)))
    embedding, positions, final, query, up = (net[name] for name in needed)
    layers = {int(found[1]) for name in net if (found := re.match(r"attn_layers\.layers\.(\d+)\.", name))}
    dim, inner = final.numel(), query.shape[0]
    dim_head = said.dim_head if "dim_head" in said.model_fields_set else 64
    if inner % dim_head:
        raise ValueError(
            f"{where}attn_layers.layers.0.1.to_q.weight has {inner} rows, not a multiple of model.dim_head = "
            f"{dim_head}; set it to the attn_dim_head of the model"
        )
    width = embedding.shape[1]
    return {
        "num_tokens": embedding.shape[0],
        "max_seq_len": positions.shape[0],
        "dim": dim,
        "depth": max(1, (max(layers) + 2) // 2),
        "heads": inner // dim_head,
        "dim_head": dim_head,
        "ff_mult": _multiple(up.shape[0], dim),
        "emb_dim": None if width == dim else width,
        "positions": "learned",
        "norm": "layernorm",
        "feed_forward": "gelu",
        "qk_norm": False,
        "tied_embeddings": "to_logits.weight" not in net,
    }


def _multiple(inner: int, dim: int) -> float:
    """An ff_mult for which int(dim * ff_mult) is `inner`."""
    mult = inner / dim
    return mult if int(dim * mult) == inner else (inner + 0.5) / dim


def _translate(parts: _Parts, found: Imported) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = {
            name: tensor.shape for name, tensor in Networks(found.model, found.objective).state_dict().items()
        }
    weights = _encoder(parts.net, found.model, "generator.", parts.where)
    for name, tensor in parts.conditioning.items():
        weights[f"generator.{name}"] = tensor
    if parts.critic_kind == "self":
        weights |= {f"critic.{name.removeprefix('to_logits.')}": t for name, t in parts.critic.items()}
    elif parts.critic_kind == "token":
        sizes = _sizes(parts.critic, "token_critic.", found.model)
        apart = [key for key in sizes if key != "tied_embeddings" and sizes[key] != getattr(found.model, key)]
        if apart:
            raise ValueError(
                "\n".join(
                    f"token_critic: {key} is {sizes[key]!r}, but the generator's is "
                    f"{getattr(found.model, key)!r}; both must have the same sizes"
                    for key in apart
                )
            )
        weights |= _encoder(parts.critic, _of_critic(found.model), "critic.", "token_critic.")
    wrong = [
        f"{name} must be {tuple(wanted[name])}, got {tuple(tensor.shape)}: {_reason(name)}"
        for name, tensor in weights.items()
        if tensor.shape != wanted[name]
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    return {name: weights[name].to(torch.float32, copy=True).contiguous() for name in wanted}


def _reason(name: str) -> str:
    """The likely reason why a weight has another shape."""
    if name.startswith("critic."):
        return "the critic must have the sizes of the generator, and one score per position"
    if "to_qkv" in name or "to_out" in name:
        return "attn_kv_heads, attn_one_kv_head and attn_value_dim_head are not supported"
    if "to_logits" in name:
        return "logits_dim is not supported"
    if "self_cond" in name or "null_embed" in name:
        return "self-conditioning with emb_dim other than dim is not supported: x-transformers cannot run it"
    return "all layers must have the same sizes"


def _encoder(net: Tensors, model: ModelConfig, ours: str, where: str) -> dict[str, Tensor]:
    """The weights of an encoder by our names. Stacks those that we keep in one tensor."""
    names = x_transformers_names(model)
    theirs = {name for group in names.values() for name in group}
    absent = theirs - net.keys()
    if absent and all(name.endswith("to_out.weight") for name in absent):
        raise ValueError(
            f"{where}attn_layers: heads=1, or attn_project_out=False, is not supported: to_out is missing"
        )
    lines = x_transformers_options.missing(absent, where)
    if not lines:
        lines = [
            f"{where}{name} is not a weight of a TransformerWrapper(Encoder) with {model.depth} layers"
            for name in sorted(net.keys() - theirs)
        ]
    if lines:
        raise ValueError("\n".join(lines))
    widths = {net[n].shape[1:] for group in names.values() if len(group) > 1 for n in group}
    if len(widths) > 1:
        raise ValueError(f"{where}attn_layers: queries, keys and values must all have {model.dim} inputs")
    return {f"{ours}{name}": torch.cat([net[n] for n in group]) for name, group in names.items()}


def _untranslate(weights: Tensors, model: ModelConfig, ours: str, where: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, group in x_transformers_names(model).items():
        pieces = weights[f"{ours}{name}"].chunk(len(group))
        found |= {f"{where}{theirs}": piece for theirs, piece in zip(group, pieces, strict=True)}
    return found


def _shift_gains(weights: dict[str, Tensor], gains: Gains) -> None:
    """Convert the gains of the norms to gamma + 1, as in our encoder."""
    names = [name for name in weights if name.endswith(".gamma")]
    mean = float(torch.cat([weights[name] for name in names]).mean())
    if gains == "auto" and mean > 0.5:
        # Untrained, gamma is 0 for offset and 1 for plain. Above 0.5 only the user can say which it is.
        raise ValueError(
            f"the gains of the norms have the mean {mean:.2f}, which fits either kind: set --gains plain "
            "(norm_add_unit_offset=False, or an older x-transformers: the gain is gamma) or --gains offset "
            "(the default of newer versions: gamma + 1)"
        )
    if gains == "plain":
        for name in names:
            weights[name] -= 1
