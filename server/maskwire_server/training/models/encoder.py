"""The encoder: a pre-norm bidirectional transformer over token ids.

Letters: b rows, n positions, d dim, e embedding width, h heads, c channels of a head, v vocabulary,
m selected positions.
The last block computes its queries, and everything after them, only at the positions that are read.

It computes the same as x-transformers' `TransformerWrapper(attn_layers=Encoder(...))` with the corresponding
options, so that weights trained with x-transformers can be imported (`x_transformers_names`).

Initialisation: token embeddings N(0, 2/e); positions N(0, 1), scaled by e^-1/2 where they are used
(x-transformers); linear maps U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default, which is
Kaiming-uniform with a = sqrt(5) (He et al. 2015); norm gains 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskwire_server.config import ModelConfig
from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head
from maskwire_server.training.models.backbone import Backbone, packed


class Norm(nn.Module):
    """Layer normalisation or root-mean-square normalisation, with a gain of 1 + gamma and no bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(config.dim))
        self.kind = config.norm
        self.rms_eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x, [..., d]. Under autocast, compute in fp32."""
        gain = self.gamma + 1
        if self.kind == "layernorm":
            return F.layer_norm(x, gain.shape, gain, eps=1e-5)
        return F.rms_norm(x, gain.shape, gain, eps=self.rms_eps)


class HeadNorm(nn.Module):
    """Root-mean-square normalisation of queries or keys.

    The gains, 1 + gamma, are shared by all heads, separate for each head, or absent.
    """

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.dim_head = config.dim_head
        self.eps = config.rms_norm_eps
        self.heads = heads if config.qk_norm_gain == "per_head" else 1
        # One dimension, as gains have in general: matrices get weight decay.
        gamma = torch.zeros(self.heads * self.dim_head)
        self.gamma = None if config.qk_norm_gain == "none" else nn.Parameter(gamma)

    def forward(self, x_bhnc: Tensor) -> Tensor:
        """Normalise the last dimension of x, [b, h, n, c]. Under autocast, compute in fp32."""
        gain = None if self.gamma is None else self.gamma + 1
        if gain is None or self.heads == 1:
            return F.rms_norm(x_bhnc, (self.dim_head,), gain, eps=self.eps)
        normed = F.rms_norm(x_bhnc, (self.dim_head,), eps=self.eps)
        return normed * gain.view(self.heads, 1, self.dim_head)


class Attention(nn.Module):
    """Multi-head self-attention. With `kv_heads`, consecutive query heads share a key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.dim_head = config.dim_head
        self.dropout = config.dropouts.attention
        self.interleaved = config.rotary_pairs == "interleaved"
        # The scale of the products. None is dim_head^-1/2, torch's default.
        self.scale = None if config.qk_norm_scale is None else config.qk_norm_scale / config.dim_head
        self.to_qkv = nn.Linear(config.dim, sum(config.qkv_sizes), bias=False)
        self.to_out = nn.Linear(config.heads * config.dim_head, config.dim, bias=False)
        self.q_norm = HeadNorm(config, self.heads) if config.qk_norm else None
        self.k_norm = HeadNorm(config, self.kv_heads) if config.qk_norm else None
        self.qkv_sizes = config.qkv_sizes
        self.stacked_rows = {"to_qkv": config.qkv_sizes}
        """The rows of each matrix that a linear map stacks. Muon updates each matrix separately."""

    def forward(
        self, x_bnd: Tensor, keep: Tensor | None, rotation: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """Map x, [b, n, d], to an output of the same shape, or of the shape [m, d] at the positions `read_m`.

        `keep` is True for the keys to attend to, bool [b, 1, 1, n]; None: all keys. `rotation` is the result
        of `_rotation`; None: no rotary positions. `read_m` is as in `Backbone.forward`.
        """
        # Three products, because attention on slices of one fused product makes a step 3% slower on a CPU.
        to_q, to_k, to_v = self.to_qkv.weight.split_with_sizes(self.qkv_sizes)
        products = (self._queries(x_bnd, to_q, read_m), F.linear(x_bnd, to_k), F.linear(x_bnd, to_v))
        q, k, v = (rearrange(each, "b n (h c) -> b h n c", c=self.dim_head) for each in products)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (_rotate(each, rotation, interleaved=self.interleaved) for each in (q, k))
        grouped = self.kv_heads < self.heads
        if grouped and x_bnd.device.type != "cpu":
            # On CUDA, a mask with enable_gqa falls back to the kernel that keeps all products (torch 2.13).
            k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale, enable_gqa=grouped,
        )  # fmt: skip
        out = rearrange(out, "b h n c -> b n (h c)")
        out = self.to_out(out if read_m is None else packed(out, read_m))
        return F.dropout(out, self.dropout, self.training)

    def _queries(self, x_bnd: Tensor, to_q: Tensor, read_m: Tensor | None) -> Tensor:
        """The queries, [b, n, h c]. If `read_m` is given, they are 0 at all other positions."""
        if read_m is None:
            return F.linear(x_bnd, to_q)
        q_md = F.linear(packed(x_bnd, read_m), to_q)
        q = q_md.new_zeros(x_bnd.shape[0] * x_bnd.shape[1], q_md.shape[1]).index_copy(0, read_m, q_md)
        return q.view(*x_bnd.shape[:2], -1)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "geglu": F.gelu, "silu": F.silu, "swiglu": F.silu, "relu_squared": _relu_squared
}  # fmt: skip


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, which may be gated (Shazeer 2020).

    The inner width is int(dim * ff_mult) with and without a gate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = int(config.dim * config.ff_mult)
        self.gated = config.gated
        self.activation = _ACTIVATIONS[config.feed_forward]
        self.dropout = config.dropouts.feed_forward
        up_bias, down_bias = config.ff_biases
        self.up = nn.Linear(config.dim, inner * (2 if self.gated else 1), bias=up_bias)
        self.down = nn.Linear(inner, config.dim, bias=down_bias)
        self.stacked_rows = {"up": (inner, inner)} if self.gated else {}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward layers to x, [..., d]. The shape does not change."""
        x = self.up(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = x * self.activation(gate)
        else:
            x = self.activation(x)
        x = self.down(F.dropout(x, self.dropout, self.training))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_bnd: Tensor, keep: Tensor | None, rotation: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """Map x, [b, n, d], to an output of the same shape, or of shape [m, d] at `read_m`."""
        attended = self.attention(self.attention_norm(x_bnd), keep, rotation, read_m)
        x = (x_bnd if read_m is None else packed(x_bnd, read_m)) + attended
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Encoder(Backbone):
    """Embeds ids and applies the blocks. The last block computes only the positions that are read.

    `outputs` is the number of scores per position: the vocabulary size for a generator, 1 for a critic.
    """

    def __init__(self, config: ModelConfig, outputs: int, *, self_cond: bool = False) -> None:
        super().__init__()
        self.dim = config.dim
        width = config.emb_dim or config.dim
        self.token_emb = nn.Embedding(config.num_tokens, width)
        self.pos_emb = nn.Embedding(config.max_seq_len, width) if config.positions == "learned" else None
        self.project_emb = nn.Linear(width, config.dim) if width != config.dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = Norm(config)
        self.to_logits = None if config.tied_embeddings else nn.Linear(config.dim, outputs, bias=False)
        if self_cond:
            self.condition_itself(config.dim, width)
        self.config = config
        self.dropout = config.dropouts.embedding
        self._recomputes = False
        nn.init.normal_(self.token_emb.weight, std=math.sqrt(2 / width))
        if self.pos_emb is not None:
            nn.init.normal_(self.pos_emb.weight)

    def forward(
        self,
        ids_bn: Tensor,
        valid_bn: Tensor | None,
        cond: Conditioning = None,
        read_m: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings after the final norm, [b, n, d], or only those at `read_m`, [m, d].

        The last block computes queries, output and feed-forward only at the positions `read_m`.
        """
        n = ids_bn.shape[1]
        x = self.token_emb(ids_bn)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:n] * self.pos_emb.embedding_dim**-0.5
        added = self.conditioning(cond)
        if added is not None:
            x = x + added
        x = F.dropout(x, self.dropout, self.training)
        if self.project_emb is not None:
            x = self.project_emb(x)
        keep = None
        if valid_bn is not None:
            # A row of nothing but padding attends to all its positions. A softmax over no keys would be NaN,
            # and so would the gradients, even if the output of the row is not used.
            keep = rearrange(valid_bn | ~valid_bn.any(-1, keepdim=True), "b n -> b 1 1 n")
        rotation = None if self.pos_emb is not None else _rotation(n, self.config, x.device)
        for index, block in enumerate(self.blocks, 1):
            inputs = (x, keep, rotation, read_m if index == len(self.blocks) else None)
            if self._recomputes and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        e: Tensor = self.final_norm(x)
        return e

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the output layer for the embeddings of m positions.

        If the weight is the token embedding, its factor d^(-1/2) is applied to the returned input instead.
        """
        if self.to_logits is not None:
            return Head(e_md, self.to_logits.weight)
        return Head(e_md / math.sqrt(e_md.shape[-1]), self.token_emb.weight)

    def checkpoint_activations(self, on: bool) -> None:
        """Turn activation checkpointing on or off. With it, the backward pass recomputes each block."""
        self._recomputes = on


def _rotation(n: int, config: ModelConfig, device: torch.device) -> Tensor:
    """The cosines and sines of the rotary angles of r channels, fp32 [2, n, r] (Su et al. 2021)."""
    width = config.rotary_dim or config.dim_head
    exponent = torch.arange(0, width, 2, device=device) / width
    if config.rotary_pairs == "interleaved":
        # Rounded as in x-transformers, so that imported weights see the same angles in long rows.
        inverse_wavelength = 1.0 / config.rotary_base**exponent
    else:
        inverse_wavelength = config.rotary_base**-exponent
    angle_nc = torch.arange(n, device=device)[:, None] * inverse_wavelength
    if config.rotary_pairs == "interleaved":
        angle_nc = angle_nc.repeat_interleave(2, dim=-1)
    else:
        angle_nc = torch.cat((angle_nc, angle_nc), dim=-1)
    return torch.stack((angle_nc.cos(), angle_nc.sin()))


def _rotate(x_bhnc: Tensor, rotation: Tensor, *, interleaved: bool) -> Tensor:
    cos, sin = rotation.to(x_bhnc.dtype).unbind()
    width = cos.shape[-1]
    if width < x_bhnc.shape[-1]:
        rotated = _rotate(x_bhnc[..., :width], rotation, interleaved=interleaved)
        return torch.cat((rotated, x_bhnc[..., width:]), dim=-1)
    if interleaved:
        left, right = x_bhnc[..., ::2], x_bhnc[..., 1::2]
        turned = torch.stack((-right, left), dim=-1).flatten(-2)
    else:
        left, right = x_bhnc.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
    return x_bhnc * cos + turned * sin
