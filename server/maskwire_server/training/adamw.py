"""AdamW with torch's function `adamw`, without the class `torch.optim.AdamW`.

Constructing any `torch.optim.Optimizer` imports `torch._dynamo`. This takes longer than all other work of a
server's start after the import of torch, and is not needed here, because no optimizer is compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class Optimizer(ABC):
    """Groups of weights with their settings, and the state of each weight, as in `torch.optim.Optimizer`."""

    def __init__(self, **defaults: float) -> None:
        """`defaults` are the settings of groups that have no own value for them."""
        self._defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add a group: its weights under the key `params`, and its settings."""
        self.param_groups.append({**self._defaults, **group})

    @abstractmethod
    def step(self) -> None:
        """Update the weights that have a gradient."""


class AdamW(Optimizer):
    """AdamW (Loshchilov, Hutter 2019). Each group has `lr`, `betas`, `eps` and `weight_decay`."""

    def __init__(self, *, fused: bool) -> None:
        """With `fused`, all weights of a group are updated in one kernel."""
        super().__init__()
        self._fused = fused

    def allocate(self, weight: Tensor) -> None:
        """Allocate the state of a weight: its step count and its two moments, all 0."""
        self.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [self.state[weight] for weight in weights]
            beta1, beta2 = group["betas"]
            adamw(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=self._fused,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
