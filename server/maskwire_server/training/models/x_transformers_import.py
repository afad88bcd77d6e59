"""Import weights of x-transformers into the built-in encoder.

The weights are those of a `NonAutoregressiveWrapper` or a `TransformerWrapper(Encoder)`.

Sizes, tied embeddings, critic and self-conditioning are read from the state dict. Settings that contradict
the state dict are errors, and so are options that the built-in encoder does not have. For a model with such
options, see `x_transformers_import_unchanged`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training.models import x_transformers_unsupported
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.models.x_transformers_names import (
    INVERSE_WAVELENGTHS,
    Tensors,
    from_x_transformers,
    x_transformers_names,
)
from maskwire_server.training.models.x_transformers_sizes import sizes
from maskwire_server.training.models.x_transformers_unsupported import HOSTED
from maskwire_server.training.models.x_transformers_wrapper_parts import (
    Imported,
    Parts,
    contradictions,
    objective_of,
    said,
    take_apart,
    with_objective,
)

Gains = Literal["auto", "offset", "plain"]

# The settings of [model] that are compared with the state dict.
_COMPARED = (
    "num_tokens", "max_seq_len", "dim", "depth", "heads", "kv_heads", "dim_head", "ff_mult", "emb_dim",
    "positions", "rotary_dim", "rotary_pairs", "rotary_base", "norm", "feed_forward", "ff_bias",
    "ff_down_bias", "qk_norm", "qk_norm_gain", "qk_norm_scale", "tied_embeddings",
)  # fmt: skip


def import_state_dict(
    tensors: Tensors, model: ModelConfig, objective: ObjectiveConfig, *, gains: Gains = "auto"
) -> Imported:
    """Convert a state dict to weights and settings of the built-in encoder.

    Settings that the user gave in `model` and `objective` are compared with the state dict. `gains` says
    whether the gain of a norm is gamma + 1 ("offset", the default of x-transformers) or gamma ("plain", for
    norm_add_unit_offset=False and older versions); "auto" means "offset", and is an error if the values may
    be plain. Raises ValueError with one line for each problem.
    """
    parts = take_apart(tensors)
    shown = sizes(parts.net, parts.where, model)
    settings = said(model)
    if settings.get("emb_dim") == shown["dim"]:
        del settings["emb_dim"]
    problems = _unset(model, shown)
    problems += contradictions("model", settings, {key: shown[key] for key in _COMPARED if key in shown})
    problems += contradictions("objective", said(objective), objective_of(parts))
    if problems:
        raise ValueError("\n".join(problems))
    try:
        whole = ModelConfig(**{**said(model), **shown})
        found = Imported(whole, with_objective(parts, objective), {})
    except ValidationError as error:
        lines = (f"model.{problem['msg'].removeprefix('Value error, ')}" for problem in error.errors())
        raise ValueError("\n".join(lines)) from error
    weights = _translate(parts, found)
    _shift_gains(weights, gains)
    return Imported(found.model, found.objective, weights)


def _unset(model: ModelConfig, shown: dict[str, Any]) -> list[str]:
    """One line of error text for each setting that is missing and that the state dict does not show."""
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


def _translate(parts: Parts, found: Imported) -> dict[str, Tensor]:
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
        f"{name} must have shape {tuple(wanted[name])}, got {tuple(tensor.shape)}: {_reason(name)}"
        for name, tensor in weights.items()
        if tensor.shape != wanted[name]
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    return {name: weights[name].to(torch.float32, copy=True).contiguous() for name in wanted}


def _reason(name: str) -> str:
    """The likely reason why a weight does not have the expected shape."""
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
    """Convert an encoder of x-transformers to the built-in one. `ours` is the prefix of the new names."""
    names = x_transformers_names(model)
    theirs = {name for group in names.values() for name in group}
    absent = theirs - net.keys()
    if absent and all(name.endswith("to_out.weight") for name in absent):
        raise ValueError(
            f"{where}attn_layers: heads=1, or attn_project_out=False, is not supported: to_out is missing; "
            f"{HOSTED}"
        )
    lines = x_transformers_unsupported.missing(absent, where)
    if not lines:
        lines = [
            f"{where}{name} is not a weight of a TransformerWrapper(Encoder) with {model.depth} layers"
            for name in sorted(net.keys() - theirs - {INVERSE_WAVELENGTHS})
        ]
    if lines:
        raise ValueError("\n".join(lines))
    widths = {net[n].shape[1:] for group in names.values() if len(group) > 1 for n in group}
    if len(widths) > 1:
        raise ValueError(f"{where}attn_layers: to_q, to_k and to_v must all have {model.dim} columns")
    return {f"{ours}{name}": tensor for name, tensor in from_x_transformers(net, model).items()}


def _shift_gains(weights: dict[str, Tensor], gains: Gains) -> None:
    """Convert the norms in place, so that their gains are gamma + 1, as in the built-in encoder."""
    of_heads = ("q_norm.gamma", "k_norm.gamma")  # `from_x_transformers` has converted them
    names = [name for name in weights if name.endswith(".gamma") and not name.endswith(of_heads)]
    mean = float(torch.cat([weights[name] for name in names]).mean())
    if gains == "auto" and mean > 0.5:
        # Untrained, gamma is 0 for offset and 1 for plain. Above 0.5, only the user can say which kind it is.
        raise ValueError(
            f"the parameters of the norms have the mean {mean:.2f}, which does not show whether a gain is "
            "gamma or gamma + 1: set --gains plain for gamma (norm_add_unit_offset=False, or an older "
            "x-transformers), or --gains offset for gamma + 1 (the default of newer versions)"
        )
    if gains == "plain":
        for name in names:
            weights[name] -= 1
