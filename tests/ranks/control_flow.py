"""Models that a user might bring, in which data or random numbers decide which layers compute."""

from __future__ import annotations

from typing import Any

import torch
from in_place import Layer, Model
from torch import Tensor, nn


class Routed(nn.Module):
    """A mixture of experts: each position uses one of them, and no position uses the last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(number): nn.Linear(dim, dim) for number in range(5)})
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        choice = flat[:, :4].argmax(-1)
        out = flat * self.gain
        for number, expert in enumerate(self.experts.values()):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, torch.tanh(expert(flat[rows])))
        return out.view(x.shape).clone()


class Experts(Model):
    """Two layers with experts, as `blocks` or outside of them."""

    def __init__(self, model: Any, blocks: bool) -> None:
        super().__init__(model, in_place=False)
        layers = Routed(16), Routed(16)
        if blocks:
            self.blocks = nn.ModuleList(layers)
        else:
            del self.blocks
            self.first, self.second = layers

    def layers(self) -> list[nn.Module]:
        return list(self.blocks) if hasattr(self, "blocks") else [self.first, self.second]


class Skipping(Model):
    """Skips layers, while it trains, after the steps of its check, or whenever the data say so.

    "call" does not call them, "output" does not use their output, "inside" multiplies it by 0.
    """

    def __init__(self, model: Any, skip: str, when: str) -> None:
        super().__init__(model, in_place=False)
        self.blocks = nn.ModuleList(Layer(16) for _ in range(4))
        self.skip, self.when = skip, when

    def skips(self, index: int, x: Tensor) -> bool:
        if self.when == "random":
            return self.training and float(torch.rand(())) < 0.5
        return index in (1, 3) and self.training and x.shape[0] * x.shape[1] < 32

    def body(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            skips = self.skips(index, x)
            if skips and self.skip == "call":
                continue
            y = block(x)
            if self.skip == "inside":
                y = y * (1.0 - skips)
            elif skips:
                continue
            x = x + y
        return x


def routed(model: Any, blocks: bool = True) -> nn.Module:
    return Experts(model, blocks)


def skipping(model: Any, skip: str, when: str) -> nn.Module:
    return Skipping(model, skip, when)
