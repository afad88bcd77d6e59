"""Find the settings of [model] from the weights of a `TransformerWrapper(Encoder)`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from maskwire_server.config import ModelConfig
from maskwire_server.training.models import x_transformers_unsupported
from maskwire_server.training.models.x_transformers_names import INVERSE_WAVELENGTHS, Tensors

_NORMALIZE_EPS = 1e-24
"""The square of the smallest norm by which x-transformers divides (torch's F.normalize)."""
_COSINE_SCALE = 10.0
"""The default of x-transformers' attn_qk_norm_scale."""


def sizes(net: Tensors, where: str, said: ModelConfig) -> dict[str, Any]:
    """Find the settings of [model] from the weights `net`. Raises ValueError for unsupported options.

    Settings that no weight shows are taken from the user's settings, `said`, if they fit the weights. `where`
    is the prefix of the weights' names in the file.
    """
    lines = x_transformers_unsupported.named(net, where)
    if lines:
        raise ValueError("\n".join(lines))
    embedding = _one_of(net, "token_emb.emb.weight")
    final = _one_of(net, "attn_layers.final_norm.gamma", "attn_layers.final_norm.g")
    query = _one_of(net, "attn_layers.layers.0.1.to_q.weight")
    up = _one_of(net, "attn_layers.layers.1.1.ff.0.0.weight", "attn_layers.layers.1.1.ff.0.proj.weight")
    positions = _one_of(net, "pos_emb.emb.weight", INVERSE_WAVELENGTHS)
    absent = [name for name, tensor in (embedding, final, query, up, positions) if tensor is None]
    if len(absent) == 5:
        names = ", ".join(sorted(net)[:3])
        raise ValueError(
            "these are not the weights of a TransformerWrapper(Encoder): none has a name that it uses, got "
            f"{names}"
        )
    if absent:
        raise ValueError("\n".join(x_transformers_unsupported.missing(absent, where)))
    if INVERSE_WAVELENGTHS in net and "pos_emb.emb.weight" in net:
        name = f"{where}pos_emb.emb.weight"
        raise ValueError(
            x_transformers_unsupported.message(
                "disable_abs_pos_emb=False",
                f"{name} in addition to rotary positions",
                "either learned or rotary positions",
            )
        )
    width, dim = net[embedding[0]].shape[1], net[query[0]].shape[1]
    if net[final[0]].numel() != dim:
        raise ValueError(
            x_transformers_unsupported.message(
                "use_scalenorm",
                f"{where}{final[0]} has {net[final[0]].numel()} gains",
                "layernorm and rmsnorm",
            )
        )
    layers = {int(part[1]) for name in net if (part := re.match(r"attn_layers\.layers\.(\d+)\.", name))}
    norm = "layernorm" if final[0].endswith("gamma") else "rmsnorm"
    found: dict[str, Any] = {
        "num_tokens": net[embedding[0]].shape[0],
        "dim": dim,
        "depth": max(1, (max(layers) + 2) // 2),
        "emb_dim": None if width == dim else width,
        "norm": norm,
        "tied_embeddings": "to_logits.weight" not in net,
    }
    found |= _heads(net, where, said)
    found |= _qk_norm(net, where, said, found["dim_head"])
    found |= _feed_forward(net, up[0], said, dim)
    if positions[0] == INVERSE_WAVELENGTHS:
        found |= _rotary(net[INVERSE_WAVELENGTHS], where, said)
    else:
        found |= {"positions": "learned", "max_seq_len": net[positions[0]].shape[0]}
    if (norm == "rmsnorm" or found["qk_norm"]) and "rms_norm_eps" not in said.model_fields_set:
        found["rms_norm_eps"] = _NORMALIZE_EPS
    return found


def _one_of(net: Tensors, *names: str) -> tuple[str, Tensor | None]:
    """The first name that `net` has, with its tensor. If it has none, the first name, with None."""
    return next(((name, net[name]) for name in names if name in net), (names[0], None))


def _heads(net: Tensors, where: str, said: ModelConfig) -> dict[str, Any]:
    attention = "attn_layers.layers.0.1."
    dim_head = said.dim_head if "dim_head" in said.model_fields_set else 64
    for name in ("q_rmsnorm.gamma", "qk_norm_q_scale"):
        if "dim_head" not in said.model_fields_set and f"{attention}{name}" in net:
            dim_head = net[f"{attention}{name}"].shape[-1]
    inner: dict[str, int] = {}
    for part in "qk":
        name = f"{attention}to_{part}.weight"
        inner[part] = net[name].shape[0] if name in net else inner["q"]  # a missing weight is reported later
        if inner[part] % dim_head:
            raise ValueError(
                f"{where}{name} has {inner[part]} rows, which is not a multiple of model.dim_head = "
                f"{dim_head}; set model.dim_head to the attn_dim_head of the model"
            )
    heads, kv_heads = inner["q"] // dim_head, inner["k"] // dim_head
    same = kv_heads == heads and said.kv_heads is None
    return {"heads": heads, "dim_head": dim_head, "kv_heads": None if same else kv_heads}


def _qk_norm(net: Tensors, where: str, said: ModelConfig, dim_head: int) -> dict[str, Any]:
    attention = "attn_layers.layers.0.1."
    if f"{attention}q_rmsnorm.gamma" in net:
        return {"qk_norm": True, "qk_norm_gain": "per_head", "qk_norm_scale": None}
    if f"{attention}k_rmsnorm.gamma" in net:
        raise ValueError(
            x_transformers_unsupported.message(
                "attn_k_rmsnorm", f"{where}{attention}k_rmsnorm.gamma", "attn_qk_rmsnorm"
            )
        )
    if f"{attention}qk_norm_q_scale" in net:
        # The products of x-transformers have the factor dim_head^-1/2, and a gain is gamma, not gamma + 1.
        return {"qk_norm": True, "qk_norm_gain": "per_head", "qk_norm_scale": dim_head**-0.5}
    if said.qk_norm and said.qk_norm_gain == "none":  # without gains, no weight shows it
        scale = said.qk_norm_scale or _COSINE_SCALE
        return {"qk_norm": True, "qk_norm_gain": "none", "qk_norm_scale": scale}
    return {"qk_norm": False}


def _feed_forward(net: Tensors, up: str, said: ModelConfig, dim: int) -> dict[str, Any]:
    gated = up.endswith("proj.weight")
    activation = said.feed_forward if said.gated == gated else "geglu" if gated else "gelu"
    up_bias = up.replace("weight", "bias") in net
    down_bias = "attn_layers.layers.1.1.ff.2.bias" in net
    inner = net[up].shape[0] // (2 if gated else 1)
    mult = inner / dim
    return {
        # An ff_mult for which int(dim * ff_mult) is the inner width.
        "ff_mult": mult if int(dim * mult) == inner else (inner + 0.5) / dim,
        "feed_forward": activation,
        "ff_bias": up_bias,
        "ff_down_bias": None if up_bias == down_bias else down_bias,
    }


def _rotary(inverse: Tensor, where: str, said: ModelConfig) -> dict[str, Any]:
    base = _base(inverse.double())
    if base is None:
        raise ValueError(
            x_transformers_unsupported.message(
                "this rotary_pos_emb",
                f"{where}{INVERSE_WAVELENGTHS} are not the powers of one base",
                "wavelengths that are the powers of one base",
            )
        )
    pairs = said.rotary_pairs if "rotary_pairs" in said.model_fields_set else "interleaved"
    return {
        "positions": "rotary",
        "rotary_dim": 2 * inverse.numel(),
        "rotary_pairs": pairs,
        "rotary_base": base,
    }


def _base(inverse: Tensor) -> float | None:
    """The base with the fewest digits whose powers are the values of `inverse`, or None.

    The powers may be rounded to fp32, bf16 or fp16.
    """
    count = inverse.numel()
    if count < 2:
        return 10_000.0
    exact = float(inverse[-1]) ** (-count / (count - 1))
    exponent = torch.arange(count, dtype=torch.float64) / count
    for tolerance, most in ((5e-7, 9), (2**-8, 2)):
        for digits in range(1, most + 1):
            base = float(f"{exact:.{digits}g}")
            if base > 1 and torch.allclose(base**-exponent, inverse, rtol=tolerance, atol=0):
                return base
    return None
