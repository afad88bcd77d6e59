"""Optimizers: one for the generator and one for the critic, so that training one never changes the other.

The optimizer state and the moving average of a group change only in steps that train it. The learning rate
depends on the step of the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from maskwire_server.config import OptimizerConfig
from maskwire_server.training import module_state
from maskwire_server.training.numerics import NUMERICS_VERSION


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate at a step, counted from 1.

    The linear warm-up reaches the peak at step `warmup_steps`. The cosine is lr_min + (lr - lr_min)
    (1 + cos(pi p))/2, where p is the progress from there to `total_steps` (Loshchilov, Hutter 2017).
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant" or config.total_steps is None:
        return peak
    progress = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def _decayed(module: nn.Module) -> set[Tensor]:
    """The weights with weight decay: the matrices of linear maps, not norms, biases or embeddings.

    Embeddings are recognised by their class, not by their name, because `project_emb` is a linear map.
    """
    embeddings = {child.weight for child in module.modules() if isinstance(child, nn.Embedding)}
    return {weight for weight in module.parameters() if weight.ndim >= 2 and weight not in embeddings}


class Group:
    """The weights of the generator or of the critic, their AdamW and their moving average."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, fused: bool) -> None:
        parameters = dict(module.named_parameters())
        named = {name: weight for name, weight in parameters.items() if weight.requires_grad}
        self.frozen = {name: weight for name, weight in parameters.items() if name not in named}
        """Weights that are never trained, by name: those under low-rank adapters."""
        self.buffers = module_state.buffers(module)
        """Tensors of the module's state that are not weights, by name. No step changes them."""
        self.names = list(named)
        self.weights = list(named.values())
        decays = _decayed(module)
        since: dict[float, list[Tensor]] = {1: [], 2: [], math.inf: []}
        for name, weight in named.items():
            # Numerics version 1 treated `project_emb` as an embedding.
            since[math.inf if weight not in decays else 2 if "_emb." in name else 1].append(weight)
        groups = [{"params": weights, "decays_since": version} for version, weights in since.items()]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=fused,
        )
        self.configure(config)
        for weight in self.weights:  # allocated now, so that the first update cannot run out of memory
            self.optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self.updates = 0
        """Number of steps that trained this group."""
        self.ema = self._copy(module) if config.ema_decay else None
        """The module with the moving average of the weights, if the run keeps one."""

    def configure(self, config: OptimizerConfig, numerics_version: int = NUMERICS_VERSION) -> None:
        """Apply new settings. A moving average cannot be added or removed."""
        for group in self.optimizer.param_groups:
            group["betas"], group["eps"] = config.betas, config.eps
            decays = numerics_version >= group["decays_since"]
            group["weight_decay"] = config.weight_decay if decays else 0.0
        self._decay = config.ema_decay

    def gradients(self) -> list[Tensor]:
        """The gradients of the weights that have one."""
        return [weight.grad for weight in self.weights if weight.grad is not None]

    def clear_gradients(self) -> None:
        """Delete the gradients and free their memory."""
        for weight in self.weights:
            weight.grad = None

    def update(self, rate: float) -> None:
        """Update the weights with their gradients, then the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.updates += 1
        if self.ema is not None:
            # min(d, (1+s)/(10+s)): a smaller decay at the start, so that the average follows quickly
            # (tf.train.ExponentialMovingAverage in TensorFlow).
            decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
            averages = list(self.averages().values())
            torch._foreach_lerp_(averages, [weight.detach() for weight in self.weights], 1 - decay)

    def averages(self) -> dict[str, Tensor]:
        """The moving averages of the weights, by name. Empty if the run keeps none."""
        if self.ema is None:
            return {}
        found = dict(self.ema.named_parameters())
        return {name: found[name] for name in self.names}

    def begin_average(self) -> None:
        """Set the moving average, if the run keeps one, to the weights."""
        if self.ema is not None:
            with torch.no_grad():
                for average, weight in zip(self.averages().values(), self.weights, strict=True):
                    average.copy_(weight)
                for name, buffer in module_state.buffers(self.ema).items():
                    buffer.copy_(self.buffers[name])

    def _copy(self, module: nn.Module) -> nn.Module:
        """A copy of the module that shares the weights which are never trained."""
        memo = {id(weight): weight for weight in self.frozen.values()}
        return copy.deepcopy(module, memo).eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """The state of AdamW and the number of updates, by name."""
        state = {"updates": torch.tensor(self.updates, dtype=torch.int64)}
        for name, weight in zip(self.names, self.weights, strict=True):
            for part, value in self.optimizer.state[weight].items():
                state[f"{name}.{part}"] = value
        return state


def clip(groups: Iterable[Group], limit: float | None) -> Tensor:
    """Scale the gradients to a global norm of at most `limit`. Returns the norm before, fp32 []."""
    gradients = [gradient for group in groups for gradient in group.gradients()]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None and gradients:
        # min(1, limit/norm). Non-finite gradients stay non-finite, and the step is then skipped.
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
