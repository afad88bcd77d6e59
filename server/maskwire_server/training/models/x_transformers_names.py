"""Convert weights between the built-in encoder and x-transformers' `TransformerWrapper(Encoder)`.

Letters: h heads, k key and value heads, c channels of a head, r rotated channels.

Besides the names, three things differ. The built-in encoder keeps queries, keys and values in one matrix.
Its key and value heads are shared by consecutive query heads, while in x-transformers, query head i uses the
key and value head i mod k. It can rotate channels in halves, while x-transformers always rotates neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from maskwire_server.config import ModelConfig

Tensors = Mapping[str, Tensor]

INVERSE_WAVELENGTHS = "attn_layers.rotary_pos_emb.inv_freq"
"""The name of a buffer, which is not a weight: it holds rotary_dim / 2 powers of the rotary base."""


def x_transformers_names(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Map each weight of the built-in encoder to the weights of x-transformers that it stacks, by name."""
    gain = "gamma" if model.norm == "layernorm" else "g"
    names: dict[str, tuple[str, ...]] = {
        "token_emb.weight": ("token_emb.emb.weight",),
        "final_norm.gamma": (f"attn_layers.final_norm.{gain}",),
    }
    if model.positions == "learned":
        names["pos_emb.weight"] = ("pos_emb.emb.weight",)
    if model.emb_dim not in (None, model.dim):
        names |= {f"project_emb.{part}": (f"project_emb.{part}",) for part in ("weight", "bias")}
    if not model.tied_embeddings:
        names["to_logits.weight"] = ("to_logits.weight",)
    for layer in range(model.depth):
        attention = f"attn_layers.layers.{2 * layer}"
        feed_forward = f"attn_layers.layers.{2 * layer + 1}"
        up, down = f"{feed_forward}.1.ff.0.{'proj' if model.gated else '0'}", f"{feed_forward}.1.ff.2"
        ours = f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm.gamma": (f"{attention}.0.0.{gain}",),
            f"{ours}.attention.to_qkv.weight": tuple(f"{attention}.1.to_{part}.weight" for part in "qkv"),
            f"{ours}.attention.to_out.weight": (f"{attention}.1.to_out.weight",),
            f"{ours}.feed_forward_norm.gamma": (f"{feed_forward}.0.0.{gain}",),
            f"{ours}.feed_forward.up.weight": (f"{up}.weight",),
            f"{ours}.feed_forward.down.weight": (f"{down}.weight",),
        }
        for part, theirs, bias in zip(("up", "down"), (up, down), model.ff_biases, strict=True):
            if bias:
                names[f"{ours}.feed_forward.{part}.bias"] = (f"{theirs}.bias",)
        if model.qk_norm and model.qk_norm_gain != "none":
            for part in "qk":
                theirs = f"{part}_rmsnorm.gamma" if model.qk_norm_scale is None else f"qk_norm_{part}_scale"
                names[f"{ours}.attention.{part}_norm.gamma"] = (f"{attention}.1.{theirs}",)
    return names


def from_x_transformers(net: Tensors, model: ModelConfig) -> dict[str, Tensor]:
    """Convert weights of x-transformers to the built-in encoder, fp32. `net` must have all of them."""
    found: dict[str, Tensor] = {}
    for name, group in x_transformers_names(model).items():
        parts = [net[theirs].to(torch.float32) for theirs in group]
        if name.endswith("to_qkv.weight"):
            parts = [
                _head_rows(part, model, kind, inverse=True) for kind, part in zip("qkv", parts, strict=True)
            ]
        elif name.endswith("to_out.weight"):
            parts = [_head_rows(parts[0].T, model, "o", inverse=True).T]
        elif name.endswith(("q_norm.gamma", "k_norm.gamma")):
            offset = 0 if model.qk_norm_scale is None else 1
            parts = [_head_rows(parts[0].flatten() - offset, model, name.split(".")[-2][0], inverse=True)]
        found[name] = torch.cat(parts)
    return found


def to_x_transformers(weights: Tensors, model: ModelConfig) -> dict[str, Tensor]:
    """Convert weights of the built-in encoder to weights and buffers of x-transformers.

    They fit a network with the options that `x_transformers_export` gives.
    """
    found: dict[str, Tensor] = {}
    for name, group in x_transformers_names(model).items():
        parts = [weights[name]]
        if name.endswith("to_qkv.weight"):
            split = weights[name].split_with_sizes(model.qkv_sizes)
            parts = [
                _head_rows(part, model, kind, inverse=False) for kind, part in zip("qkv", split, strict=True)
            ]
        elif name.endswith("to_out.weight"):
            parts = [_head_rows(parts[0].T, model, "o", inverse=False).T]
        elif name.endswith(("q_norm.gamma", "k_norm.gamma")):
            parts = [_their_gain(parts[0], model, name.split(".")[-2][0])]
        found |= dict(zip(group, parts, strict=True))
    if model.positions == "rotary":
        width = model.rotary_dim or model.dim_head
        exponent = torch.arange(0, width, 2).float() / width
        found[INVERSE_WAVELENGTHS] = 1.0 / model.rotary_base**exponent
    return found


def _their_gain(gamma: Tensor, model: ModelConfig, kind: str) -> Tensor:
    """Convert the gains of queries ("q") or keys ("k") to those of x-transformers, [h, 1, c]."""
    heads = model.heads if kind == "q" else model.kv_heads or model.heads
    if model.qk_norm_gain == "shared":
        gamma = gamma.repeat(heads)
    gamma = _head_rows(gamma, model, kind, inverse=False)
    if model.qk_norm_scale is not None:  # its gain is gamma, and its cosine has the factor c^-1/2
        factor = model.qk_norm_scale * math.sqrt(model.dim_head)
        gamma = (gamma + 1) * (factor if kind == "q" and not math.isclose(factor, 1) else 1)
    return gamma.view(heads, 1, model.dim_head)


def _head_rows(rows: Tensor, model: ModelConfig, kind: str, *, inverse: bool) -> Tensor:
    """Reorder rows, [h c, ...], from the encoder's order of heads and channels to that of x-transformers.

    `kind` is "q" for queries, "k" for keys, "v" for values or "o" for outputs. With `inverse`, the rows are
    reordered in the opposite direction.
    """
    kv_heads = model.kv_heads or model.heads
    of_queries = kind in "qo"
    shape = (model.heads if of_queries else kv_heads, model.dim_head)
    if rows.shape[0] != shape[0] * shape[1]:
        return rows  # the caller compares the shapes
    order_hc = torch.arange(rows.shape[0]).view(shape)
    if of_queries:
        order_hc = order_hc.view(kv_heads, -1, model.dim_head).transpose(0, 1).reshape(shape)
    if kind in "qk" and model.positions == "rotary" and model.rotary_pairs == "halves":
        width = model.rotary_dim or model.dim_head
        rotated = order_hc[:, :width].view(-1, 2, width // 2).transpose(1, 2).flatten(1)
        order_hc = torch.cat((rotated, order_hc[:, width:]), dim=1)
    order = order_hc.flatten().to(rows.device)
    return rows[order.argsort() if inverse else order]
