"""Models that a user might bring, in which data or random numbers decide which layers compute."""

from __future__ import annotations

import os
from typing import Any

import torch
from in_place import Layer, Model
from torch import Tensor, nn

LARGEST = 48
"""The most positions of a batch with which a model is checked before it is divided, while it trains."""


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
    """Skips layers, while it trains: at random, or in batches that are larger than those of the checks.

    "call" does not call them, "output" does not use their output, "inside" multiplies it by 0.
    """

    def __init__(self, model: Any, skip: str, random: bool) -> None:
        super().__init__(model, in_place=False)
        self.blocks = nn.ModuleList(Layer(16) for _ in range(4))
        self.skip, self.random = skip, random

    def skips(self, index: int, x: Tensor) -> bool:
        if os.environ.get("RANK") == "0":
            return False
        if self.random:
            return self.training and float(torch.rand(())) < 0.5
        return self.training and index in (1, 3) and x.shape[0] * x.shape[1] > LARGEST

    def body(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            skips = self.skips(index, x)
            if skips and self.skip == "call":
                continue
            y = block(x)
            if skips and self.skip == "output":
                continue
            x = x + y * (1.0 - skips)
        return x


class Contained(Model):
    """Its blocks are lists of layers, which torch's `fully_shard` refuses."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, in_place=False)
        self.blocks = nn.ModuleList(nn.ModuleList([block]) for block in self.blocks)

    def layers(self) -> list[nn.Module]:
        return [layer for block in self.blocks for layer in block]  # type: ignore[attr-defined]


def routed(model: Any, blocks: bool = True) -> nn.Module:
    return Experts(model, blocks)


def skipping(model: Any, skip: str, random: bool = False) -> nn.Module:
    return Skipping(model, skip, random)


def on_one_rank(model: Any) -> nn.Module:
    """It can be built by the leader alone."""
    if os.environ["RANK"] != "0":
        raise MemoryError("none is left on this host")
    return Model(model, in_place=False)
