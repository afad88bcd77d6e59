"""The base class of the models that can be trained. They map ids to embeddings, and embeddings to logits.

Letters: b rows, n positions, d width of the embeddings, v vocabulary, m selected positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head


class Backbone(nn.Module):
    """A bidirectional token model. Each subclass implements one or more values of `model.source`.

    In checkpoints, its parameters have the same names, with the prefix `generator.` or `critic.`.
    """

    dim: int
    """The width of the embeddings."""
    blocks: nn.ModuleList | list[nn.Module]
    """The layers, in order. They can be compiled one by one, and recomputed in the backward pass."""
    null_embed: nn.Parameter | None
    to_self_cond: nn.Linear | None
    gives_logits: bool
    """Whether the forward pass returns logits, because they are not a linear map of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.null_embed = None
        self.to_self_cond = None
        self.gives_logits = False

    def condition_itself(self, dim: int, input_dim: int) -> None:
        """Add the weights of self-conditioning.

        A linear map takes the embeddings of a first pass, [b, n, dim], or the null embedding, [dim], to the
        width `input_dim`, and its result is added to the model's input embeddings.
        """
        self.null_embed = nn.Parameter(torch.zeros(dim))
        self.to_self_cond = nn.Linear(dim, input_dim, bias=False)

    def forward(
        self,
        ids_bn: Tensor,
        valid_bn: Tensor | None,
        cond: Conditioning = None,
        read_m: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of the ids, [b, n, d], or only those at `read_m`, [m, d].

        `valid_bn` is False at padding; None: there is no padding. The result of
        `conditioning(cond)` is added to the input embeddings. `read_m` holds indices into the flattened
        [b, n] grid, each at most once.
        """
        raise NotImplementedError

    def conditioning(self, cond: Conditioning) -> Tensor | None:
        """Return what self-conditioning adds to the input embeddings, or None if it adds nothing.

        The shape is [b, n, input_dim], or [input_dim] for all positions. Call this method within `forward`:
        outside of `forward`, the weights of a sharded model are not gathered. With the embeddings of a first
        pass, the null embedding is part of the graph too, so that it always has a gradient.
        """
        if cond is None or self.to_self_cond is None or self.null_embed is None:
            return None
        added: Tensor = self.to_self_cond(
            self.null_embed if isinstance(cond, str) else cond.detach() + 0.0 * self.null_embed
        )
        return added

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the output layer for the embeddings of m positions."""
        raise NotImplementedError

    def project(self, e_md: Tensor) -> Tensor:
        """Return the logits, [m, v], for the embeddings of m positions."""
        return self.head(e_md).logits()

    def checkpoint_activations(self, on: bool) -> None:
        """Turn activation checkpointing on or off. With it, the backward pass recomputes each block."""
        raise NotImplementedError


def packed(x_bnd: Tensor, read_m: Tensor) -> Tensor:
    """Select the embeddings at the positions `read_m`, [m, d].

    Indexing with a mask instead would make the backward pass ten times slower.
    """
    return x_bnd.flatten(0, 1).index_select(0, read_m)


def attended(valid_bn: Tensor | None) -> Tensor | None:
    """The keys to attend to, bool [b, n]; None: all of them.

    A row of nothing but padding attends to all its positions: a softmax over no keys would be NaN.
    """
    return None if valid_bn is None else valid_bn | ~valid_bn.any(-1, keepdim=True)


def mark_fused_maps(network: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> None:
    """Set `stacked_rows` of modules in which a linear map stacks several matrices (see `muon`).

    `fused` holds the number of equal matrices in a linear map, by the name of the module's class and the name
    of the map.
    """
    for module in network.modules():
        found = {
            name: (child.out_features // number,) * number
            for name, number in fused.get(type(module).__name__, {}).items()
            if isinstance(child := getattr(module, name, None), nn.Linear)  # torch has a GLU of its own
        }
        if found:
            module.stacked_rows = found  # type: ignore[assignment]
