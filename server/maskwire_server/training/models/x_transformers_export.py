"""Export weights as a state dict of x-transformers, with the options of the model that can load them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training.models.x_transformers_names import Tensors, to_x_transformers


def export_state_dict(model: ModelConfig, objective: ObjectiveConfig, weights: Tensors) -> dict[str, Tensor]:
    """Export weights of the built-in encoder as the state dict of a `NonAutoregressiveWrapper`.

    A self critic is exported without its copy of the generator's trunk, so the state dict must be loaded
    with strict=False. Raises ValueError if x-transformers does not support a setting of the model.
    """
    if model.heads == 1:
        raise ValueError(
            "model.heads must be at least 2 for this format, got 1: x-transformers has no output projection "
            "for a single head; export with --to maskwire"
        )
    found = _exported(weights, model, "generator.", "net.")
    if objective.self_cond:
        found["null_embed"] = weights["generator.null_embed"]
        found["to_self_cond.weight"] = weights["generator.to_self_cond.weight"]
    if objective.critic == "self":
        for part in ("weight", "bias"):
            found[f"token_critic.to_logits.{part}"] = weights[f"critic.{part}"]
    elif objective.critic == "token":
        critic = model.model_copy(update={"tied_embeddings": False})
        found |= _exported(weights, critic, "critic.", "token_critic.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def renamed(weights: Tensors) -> dict[str, Tensor]:
    """Rename the weights of an x-transformers model to the keys of a `NonAutoregressiveWrapper`.

    A self critic is exported without its copy of the generator's trunk, so the state dict must be loaded
    with strict=False.
    """
    return {  # copies: layers may share weights
        their_name(name): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def their_name(name: str) -> str:
    """Convert a weight's name in `Networks` to its name in a `NonAutoregressiveWrapper`.

    The source of the model must be x-transformers.
    """
    if name.startswith("generator."):
        return name.removeprefix("generator.")
    if name.startswith("critic.net."):
        return name.replace("critic.net.", "token_critic.", 1)
    return name.replace("critic.", "token_critic.to_logits.", 1)


def _exported(weights: Tensors, model: ModelConfig, ours: str, where: str) -> dict[str, Tensor]:
    ours_only = {name.removeprefix(ours): t for name, t in weights.items() if name.startswith(ours)}
    up, down = _their_biases(model)
    theirs = model.model_copy(update={"ff_bias": up, "ff_down_bias": down})
    for layer in range(model.depth):
        for part, bias in (("up", up), ("down", down)):
            name = f"blocks.{layer}.feed_forward.{part}"
            if bias and f"{name}.bias" not in ours_only:
                ours_only[f"{name}.bias"] = torch.zeros(ours_only[f"{name}.weight"].shape[0])
    found = to_x_transformers(ours_only, theirs)
    return {f"{where}{name}": tensor for name, tensor in found.items()}


def _their_biases(model: ModelConfig) -> tuple[bool, bool]:
    """Whether the first and the second linear map of x-transformers' feed-forward have a bias.

    If the feed-forward is gated, the first one always has a bias.
    """
    up, down = model.ff_biases
    return (True, down) if model.gated else (up or down, up or down)


def constructor(model: ModelConfig) -> str:
    """The Python expression that builds the network for the exported weights."""

    def written(options: dict[str, Any]) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    layers = f"attn_layers=Encoder({written(encoder_options(model))})"
    return f"TransformerWrapper({written(wrapper_options(model))}, {layers})"


def wrapper_options(model: ModelConfig) -> dict[str, Any]:
    """The options, without attn_layers, of the `TransformerWrapper` for the exported weights."""
    options: dict[str, Any] = {"num_tokens": model.num_tokens, "max_seq_len": model.max_seq_len}
    if model.emb_dim not in (None, model.dim):
        options["emb_dim"] = model.emb_dim
    if model.tied_embeddings:
        options["tie_embedding"] = True
    if model.dropouts.embedding:
        options["emb_dropout"] = model.dropouts.embedding
    return options


def encoder_options(model: ModelConfig) -> dict[str, Any]:
    """The options of the `Encoder` for the exported weights, without options at their defaults."""
    options: dict[str, Any] = {"dim": model.dim, "depth": model.depth, "heads": model.heads}
    options["attn_dim_head"] = model.dim_head
    if model.kv_heads not in (None, model.heads):
        options["attn_kv_heads"] = model.kv_heads
    if model.ff_mult != 4:
        options["ff_mult"] = model.ff_mult
    if model.positions == "rotary":
        width = model.rotary_dim or model.dim_head
        options |= {"rotary_pos_emb": True, "rotary_emb_dim": width}
        if model.rotary_base != 10_000:
            # The base in x-transformers is 10,000 f^(r / (r - 2)).
            options["rotary_base_rescale_factor"] = (model.rotary_base / 10_000) ** ((width - 2) / width)
    flags = {
        "use_rmsnorm": model.norm == "rmsnorm",
        "ff_glu": model.gated,
        "ff_swish": model.feed_forward in ("silu", "swiglu"),
        "ff_relu_squared": model.feed_forward == "relu_squared",
        "ff_no_bias": not _their_biases(model)[1],
    }
    if model.qk_norm and model.qk_norm_gain == "none":
        flags["attn_qk_norm"] = True
        options["attn_qk_norm_scale"] = model.qk_norm_scale or math.sqrt(model.dim_head)
    elif model.qk_norm:
        flags["attn_qk_rmsnorm"] = model.qk_norm_scale is None
        flags["attn_qk_norm"] = flags["attn_qk_norm_dim_scale"] = model.qk_norm_scale is not None
    options |= {name: True for name, set_ in flags.items() if set_}
    for name, rate in (("attn", model.dropouts.attention), ("ff", model.dropouts.feed_forward)):
        if rate:
            options |= {f"{name}_dropout": rate, f"{name}_sublayer_dropout": rate}
    return options
