"""The encoder: a pre-norm bidirectional transformer over token ids.

Letters: b rows, n positions, d dim, e embedding width, h heads, v vocabulary, m packed positions.
Outputs are computed only where they are needed: the queries of the last block and everything after them.

With learned positions, layernorm and gelu it computes the same as x-transformers'
`TransformerWrapper(attn_layers=Encoder(...))`, so that weights trained with it can be imported.
`x_transformers_names` maps the names of the weights.

Initialisation: token embeddings N(0, 2/e); positions N(0, 1), scaled by e^-1/2 where they are used
(x-transformers); linear maps U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default, which is
Kaiming-uniform with a = sqrt(5) (He et al. 2015); norm gains 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskwire_server.config import ModelConfig
from maskwire_server.training.head import Head
from maskwire_server.training.models.backbone import Backbone, packed


class Norm(nn.Module):
    """Layer or root-mean-square normalisation with a gain 1 + gamma and no bias."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d], computed in fp32 under autocast."""
        gain = self.gamma + 1
        if self.kind == "layernorm":
            return F.layer_norm(x, gain.shape, gain, eps=1e-5)
        return F.rms_norm(x, gain.shape, gain, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.dropout = config.dropout
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.stacked_rows = {"to_qkv": (inner, inner, inner)}
        """The rows of the matrices that a linear map stacks: Muon updates each by itself."""
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.q_norm = Norm(config.dim_head, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(config.dim_head, "rmsnorm") if config.qk_norm else None

    def forward(
        self, x_bnd: Tensor, keep: Tensor | None, rotation: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """`keep` is None or bool [b, 1, 1, n], True for keys to attend to. `read_m` is as in `Encoder`."""
        # Three products, because attention on slices of one fused product makes a step 3% slower on a CPU.
        to_q, to_k, to_v = self.to_qkv.weight.chunk(3)
        products = (self._queries(x_bnd, to_q, read_m), F.linear(x_bnd, to_k), F.linear(x_bnd, to_v))
        q, k, v = (rearrange(each, "b n (h c) -> b h n c", h=self.heads) for each in products)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
        out = rearrange(out, "b h n c -> b n (h c)")
        out = self.to_out(out if read_m is None else packed(out, read_m))
        return F.dropout(out, self.dropout, self.training)

    def _queries(self, x_bnd: Tensor, to_q: Tensor, read_m: Tensor | None) -> Tensor:
        """[b, n, h c], zero outside of `read_m`."""
        if read_m is None:
            return F.linear(x_bnd, to_q)
        q_md = F.linear(packed(x_bnd, read_m), to_q)
        q = q_md.new_zeros(x_bnd.shape[0] * x_bnd.shape[1], q_md.shape[1]).index_copy(0, read_m, q_md)
        return q.view(*x_bnd.shape[:2], -1)


class FeedForward(nn.Module):
    """Two linear maps around an exact GELU, or a SwiGLU (Shazeer 2020) of the same inner width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = int(config.dim * config.ff_mult)
        self.gated = config.feed_forward == "swiglu"
        self.dropout = config.dropout
        self.up = nn.Linear(config.dim, inner * (2 if self.gated else 1))
        self.stacked_rows = {"up": (inner, inner)} if self.gated else {}
        self.down = nn.Linear(inner, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        x = self.up(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = x * F.silu(gate)
        else:
            x = F.gelu(x)
        x = self.down(F.dropout(x, self.dropout, self.training))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim, config.norm)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.dim, config.norm)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_bnd: Tensor, keep: Tensor | None, rotation: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """[b, n, d] -> [b, n, d], or packed [m, d] at the positions `read_m`."""
        attended = self.attention(self.attention_norm(x_bnd), keep, rotation, read_m)
        x = (x_bnd if read_m is None else packed(x_bnd, read_m)) + attended
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Encoder(Backbone):
    """Embeds ids and runs them through the blocks. The last block computes only the positions to read.

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
        self.final_norm = Norm(config.dim, config.norm)
        self.to_logits = None if config.tied_embeddings else nn.Linear(config.dim, outputs, bias=False)
        if self_cond:
            self.condition_itself(config.dim, width)
        self.dropout = config.dropout
        self.dim_head = config.dim_head
        self._recomputes = False
        nn.init.normal_(self.token_emb.weight, std=math.sqrt(2 / width))
        if self.pos_emb is not None:
            nn.init.normal_(self.pos_emb.weight)

    def forward(
        self,
        ids_bn: Tensor,
        valid_bn: Tensor | None,
        cond: Tensor | None = None,
        read_m: Tensor | None = None,
    ) -> Tensor:
        """Embeddings after the final norm. The last block computes queries, output and feed-forward
        only at `read_m`."""
        n = ids_bn.shape[1]
        x = self.token_emb(ids_bn)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:n] * self.pos_emb.embedding_dim**-0.5
        if cond is not None and self.to_self_cond is not None:
            x = x + self.to_self_cond(cond)
        x = F.dropout(x, self.dropout, self.training)
        if self.project_emb is not None:
            x = self.project_emb(x)
        keep = None
        if valid_bn is not None:
            # A row that is all padding attends to itself. A softmax over nothing would be NaN, which spoils
            # the gradients even if its output is not used.
            keep = rearrange(valid_bn | ~valid_bn.any(-1, keepdim=True), "b n -> b 1 1 n")
        rotation = None if self.pos_emb is not None else _rotation(n, self.dim_head, x.device)
        for index, block in enumerate(self.blocks, 1):
            inputs = (x, keep, rotation, read_m if index == len(self.blocks) else None)
            if self._recomputes and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        e: Tensor = self.final_norm(x)
        return e

    def head(self, e_md: Tensor) -> Head:
        """The output layer for packed positions. Scales the embeddings, not the tied weight."""
        if self.to_logits is not None:
            return Head(e_md, self.to_logits.weight)
        return Head(e_md / math.sqrt(e_md.shape[-1]), self.token_emb.weight)

    def checkpoint_activations(self, on: bool) -> None:
        """Whether to keep only the blocks' inputs for the backward pass, and compute the rest again."""
        self._recomputes = on


def _rotation(n: int, dim_head: int, device: torch.device) -> Tensor:
    """cos and sin of the rotary angles, fp32 [2, n, c] (Su et al. 2021; base 10,000, paired halves)."""
    inverse_wavelength = 10_000 ** (-torch.arange(0, dim_head, 2, device=device) / dim_head)
    angle_nc = torch.arange(n, device=device)[:, None] * inverse_wavelength
    angle_nc = torch.cat((angle_nc, angle_nc), dim=-1)
    return torch.stack((angle_nc.cos(), angle_nc.sin()))


def _rotate(x_bhnc: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation.to(x_bhnc.dtype).unbind()
    left, right = x_bhnc.chunk(2, dim=-1)
    return x_bhnc * cos + torch.cat((-right, left), dim=-1) * sin


def x_transformers_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The names of our weights and those of a `TransformerWrapper(Encoder)`. Several of theirs are stacked.

    For the options that both have: learned positions, layernorm, gelu, no qk_norm.
    """
    names: dict[str, tuple[str, ...]] = {
        "token_emb.weight": ("token_emb.emb.weight",),
        "pos_emb.weight": ("pos_emb.emb.weight",),
        "final_norm.gamma": ("attn_layers.final_norm.gamma",),
    }
    if config.emb_dim not in (None, config.dim):
        names |= {f"project_emb.{part}": (f"project_emb.{part}",) for part in ("weight", "bias")}
    if not config.tied_embeddings:
        names["to_logits.weight"] = ("to_logits.weight",)
    for layer in range(config.depth):
        attention = f"attn_layers.layers.{2 * layer}"
        feed_forward = f"attn_layers.layers.{2 * layer + 1}"
        ours = f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm.gamma": (f"{attention}.0.0.gamma",),
            f"{ours}.attention.to_qkv.weight": tuple(f"{attention}.1.to_{part}.weight" for part in "qkv"),
            f"{ours}.attention.to_out.weight": (f"{attention}.1.to_out.weight",),
            f"{ours}.feed_forward_norm.gamma": (f"{feed_forward}.0.0.gamma",),
        }
        for part in ("weight", "bias"):
            names[f"{ours}.feed_forward.up.{part}"] = (f"{feed_forward}.1.ff.0.0.{part}",)
            names[f"{ours}.feed_forward.down.{part}"] = (f"{feed_forward}.1.ff.2.{part}",)
    return names
