"""Models that a user might bring: one changes the outputs of its layers in place, one shows no blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """Two linear maps, whose output is a view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x.flatten(0, 1)))).view(x.shape)


class Model(nn.Module):
    """A stack of layers."""

    def __init__(self, model: Any, in_place: bool, name: str = "blocks") -> None:
        super().__init__()
        self.ids = nn.Embedding(model.num_tokens, 16)
        self.layers_name = name
        setattr(self, name, nn.ModuleList(Layer(16) for _ in range(2)))
        self.output = nn.Linear(16, model.num_tokens)
        self.in_place = in_place

    def layers(self) -> Iterable[nn.Module]:
        found: Iterable[nn.Module] = getattr(self, self.layers_name)
        return found

    def body(self, x: Tensor) -> Tensor:
        for block in self.layers():
            out = block(x)
            if self.in_place:
                out += x
            else:
                out = out + x
            x = out
        return x

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def get_input_embeddings(self) -> nn.Module:
        return self.ids

    def forward(
        self, attention_mask: Tensor, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        x = self.ids(input_ids) if inputs_embeds is None else inputs_embeds
        logits: Tensor = self.output(self.body(x))
        return logits


def build(model: Any, in_place: bool = False, layers: str = "blocks") -> nn.Module:
    return Model(model, in_place, layers)
