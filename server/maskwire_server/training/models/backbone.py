"""The base class of the models that can be trained: embeddings of ids, and logits as a linear map of them.

Letters: b rows, n positions, d width of the embeddings, v vocabulary, m packed positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head


class Backbone(nn.Module):
    """A bidirectional token model. A subclass is one source of models.

    The names of its parameters are the names in checkpoints, after `generator.` or `critic.`.
    """

    dim: int
    """The width of the embeddings."""
    blocks: nn.ModuleList | list[nn.Module]
    """The layers, in order. They are compiled one by one, and recomputed in the backward pass."""
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

        The embeddings of a first pass, [b, n, dim], or the null embedding, [dim], are mapped to `input_dim`
        and added to the model's input embeddings.
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
        """Embeddings, [b, n, d], or [m, d] at the positions `read_m`.

        `valid_bn` is None if there is no padding. The result of `conditioning(cond)` is added to the
        input embeddings. `read_m` holds indices into the flattened [b, n] grid, each at most once.
        """
        raise NotImplementedError

    def conditioning(self, cond: Conditioning) -> Tensor | None:
        """What self-conditioning adds to the input embeddings: [b, n, d], or [d] for all positions, or None.

        Call it within `forward`: outside of it, the weights of a sharded model are not gathered. The null
        embedding is part of the graph in both cases, so that it always has a gradient.
        """
        if cond is None or self.to_self_cond is None or self.null_embed is None:
            return None
        added: Tensor = self.to_self_cond(
            self.null_embed if isinstance(cond, str) else cond.detach() + 0.0 * self.null_embed
        )
        return added

    def head(self, e_md: Tensor) -> Head:
        """The output layer for packed positions."""
        raise NotImplementedError

    def project(self, e_md: Tensor) -> Tensor:
        """Logits of packed positions, [m, v]."""
        return self.head(e_md).logits()

    def checkpoint_activations(self, on: bool) -> None:
        """Choose whether to keep only the blocks' inputs for the backward pass, and recompute the rest."""
        raise NotImplementedError


def packed(x_bnd: Tensor, read_m: Tensor) -> Tensor:
    """Select positions, [m, d]. Indexing with a mask would be ten times slower in the backward pass."""
    return x_bnd.flatten(0, 1).index_select(0, read_m)


def attended(valid_bn: Tensor | None) -> Tensor | None:
    """The keys to attend to. A row that is all padding attends to itself: a softmax over nothing is NaN."""
    return None if valid_bn is None else valid_bn | ~valid_bn.any(-1, keepdim=True)


def mark_fused_maps(network: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> None:
    """Set `stacked_rows` of modules in which a linear map stacks several matrices (see `muon`).

    `fused` holds, by the name of a library's class and of its linear map, the number of equal parts.
    """
    for module in network.modules():
        found = {
            name: (child.out_features // number,) * number
            for name, number in fused.get(type(module).__name__, {}).items()
            if isinstance(child := getattr(module, name, None), nn.Linear)  # torch has a GLU of its own
        }
        if found:
            module.stacked_rows = found  # type: ignore[assignment]
