"""Import weights of x-transformers.

They are those of a `NonAutoregressiveWrapper` or a `TransformerWrapper(Encoder)`.

Sizes, tied embeddings, critic and self-conditioning are read from the state dict. Settings that contradict it
are errors, and so are options that the built-in encoder does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from maskwire_server.config import PRESETS, ModelConfig, ObjectiveConfig
from maskwire_server.training.models import x_transformers_options
from maskwire_server.training.models.networks import Networks
from maskwire_server.training.models.x_transformers_names import (
    INVERSE_WAVELENGTHS,
    Tensors,
    from_x_transformers,
    x_transformers_names,
)
from maskwire_server.training.models.x_transformers_options import HOSTED
from maskwire_server.training.models.x_transformers_sizes import sizes

Gains = Literal["auto", "offset", "plain"]

# The settings of [model] and [objective] that the state dict determines.
_SHOWN = {
    "model": (
        "num_tokens", "max_seq_len", "dim", "depth", "heads", "kv_heads", "dim_head", "ff_mult", "emb_dim",
        "positions", "rotary_dim", "rotary_pairs", "rotary_base", "norm", "feed_forward", "ff_bias",
        "ff_down_bias", "qk_norm", "qk_norm_gain", "qk_norm_scale", "tied_embeddings",
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
    shown_model = sizes(parts.net, parts.where, model)
    shown_objective: dict[str, Any] = {"self_cond": bool(parts.conditioning), "critic": parts.critic_kind}
    unsaid: dict[str, Any] = {}
    if parts.conditioning:
        shown_objective["self_cond_start"] = "none"  # x-transformers does not condition the first pass
        # The weights do not show how often the first pass was taken. The default is that of x-transformers.
        unsaid["self_cond_prob"] = PRESETS["x-transformers"]["self_cond_prob"]
    problems = _unset(model, shown_model)
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


def _unset(model: ModelConfig, shown: dict[str, Any]) -> list[str]:
    """A line for each setting that the user must set, because the state dict does not show it."""
    lines = {
        "mask_id": "model.mask_id must be set to the mask_id of the NonAutoregressiveWrapper: the state dict "
        "does not contain it",
        "max_seq_len": "model.max_seq_len must be set to the maximum row length: a state dict with rotary "
        "positions does not contain it",
        "feed_forward": "model.feed_forward must be set, because the state dict shows ff_glu but not "
        'ff_swish: "geglu" for ff_glu=True alone, "swiglu" for ff_glu=True, ff_swish=True',
    }
    if shown["positions"] == "learned":
        del lines["max_seq_len"]
    if shown["feed_forward"] not in ("geglu", "swiglu"):
        del lines["feed_forward"]
    return [line for key, line in lines.items() if key not in model.model_fields_set]


def _said(section: ModelConfig | ObjectiveConfig) -> dict[str, Any]:
    return {key: getattr(section, key) for key in section.model_fields_set}


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
        of_critic = sizes(parts.critic, "token_critic.", found.model)
        apart = [
            key
            for key, value in of_critic.items()
            if key != "tied_embeddings" and value != getattr(found.model, key)
        ]
        if apart:
            raise ValueError(
                "\n".join(
                    f"token_critic: {key} is {of_critic[key]!r}, but the generator's is "
                    f"{getattr(found.model, key)!r}; both must have the same sizes"
                    for key in apart
                )
            )
        critic = found.model.model_copy(update={"tied_embeddings": False})
        weights |= _encoder(parts.critic, critic, "critic.", "token_critic.")
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
        return f"attn_value_dim_head, and layers with different heads, are not supported; {HOSTED}"
    if "to_logits" in name:
        return f"logits_dim is not supported; {HOSTED}"
    if "self_cond" in name or "null_embed" in name:
        return "self-conditioning with emb_dim other than dim is not supported: x-transformers cannot run it"
    return f"all layers must have the same sizes; {HOSTED}"


def _encoder(net: Tensors, model: ModelConfig, ours: str, where: str) -> dict[str, Tensor]:
    """The weights of an encoder by our names."""
    names = x_transformers_names(model)
    theirs = {name for group in names.values() for name in group}
    absent = theirs - net.keys()
    if absent and all(name.endswith("to_out.weight") for name in absent):
        raise ValueError(
            f"{where}attn_layers: heads=1, or attn_project_out=False, is not supported: to_out is missing; "
            f"{HOSTED}"
        )
    lines = x_transformers_options.missing(absent, where)
    if not lines:
        lines = [
            f"{where}{name} is not a weight of a TransformerWrapper(Encoder) with {model.depth} layers"
            for name in sorted(net.keys() - theirs - {INVERSE_WAVELENGTHS})
        ]
    if lines:
        raise ValueError("\n".join(lines))
    widths = {net[n].shape[1:] for group in names.values() if len(group) > 1 for n in group}
    if len(widths) > 1:
        raise ValueError(f"{where}attn_layers: queries, keys and values must all have {model.dim} inputs")
    return {f"{ours}{name}": tensor for name, tensor in from_x_transformers(net, model).items()}


def _shift_gains(weights: dict[str, Tensor], gains: Gains) -> None:
    """Convert the gains of the norms to gamma + 1, as in our encoder."""
    of_heads = ("q_norm.gamma", "k_norm.gamma")  # converted with their names
    names = [name for name in weights if name.endswith(".gamma") and not name.endswith(of_heads)]
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
