"""The optimizers of the generator and of the critic.

They are separate, so that training one of the two networks never changes the other. The optimizer state and
the moving average of a network change only in steps that train the network. The learning
rate depends on the step of the run.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from maskwire_server.config import OptimizerConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import module_state
from maskwire_server.training.adamw import AdamW
from maskwire_server.training.muon import Muon, hidden_matrices
from maskwire_server.training.numerics import NUMERICS_VERSION
from maskwire_server.training.parameter_groups import Matched, frozen, matched, trainable
from maskwire_server.training.ranks_interface import Ranks, own_part

Rule = Literal["adamw", "muon", "frozen"]


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate at a step, counted from 1.

    The linear warm-up reaches the peak, lr, at step `warmup_steps`. The cosine schedule is then
    lr_min + (lr - lr_min) (1 + cos(pi p)) / 2, where p is the progress from `warmup_steps` to `total_steps`,
    from 0 to 1 (Loshchilov, Hutter 2017).
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant" or config.total_steps is None:
        return peak
    progress = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def _decayed(module: nn.Module) -> set[Tensor]:
    """The weights that get weight decay: the matrices of linear maps, not norms, biases or embeddings.

    Embeddings are recognised by their class, not by their name, because `project_emb` is a linear map.
    """
    spared = {child.weight for child in module.modules() if isinstance(child, nn.Embedding)}
    spared |= {
        weight
        for child in module.modules()
        for name, weight in child.named_parameters(recurse=False)
        if "norm" in type(child).__name__.lower() or name in getattr(module, "undecayed", ())
    }
    return {weight for weight in module.parameters() if weight.ndim >= 2 and weight not in spared}


def rules(module: nn.Module, config: OptimizerConfig, own: Matched) -> dict[str, Rule]:
    """How each parameter of a network is trained: "adamw", "muon" or "frozen", by the parameter's name."""
    hidden = hidden_matrices(module).keys() & _decayed(module) if config.name == "muon" else set()
    found: dict[str, Rule] = {}
    for name, weight in module.named_parameters():
        frozen = not weight.requires_grad or (name in own and not own[name].train)
        found[name] = "frozen" if frozen else "muon" if weight in hidden else "adamw"
    return found


class Group:
    """The weights of the generator or of the critic, their optimizer and their moving average."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        own: Matched | None = None,
        *,
        fused: bool,
        bf16: bool = False,
        average: nn.Module | None = None,
    ) -> None:
        """`own` maps the names of parameters to their entries in `optimizer.groups`.

        With `bf16`, Muon orthogonalises updates in bfloat16. `average` is a copy of the module that will hold
        the moving average; None: the copy is made here.
        """
        own = own or {}
        self.module = module
        parameters = dict(module.named_parameters())
        self.rules = rules(module, config, own)
        """How each parameter is trained, by name. It cannot change."""
        self.frozen_names = frozen(own)
        """The names of the parameters that `optimizer.groups` freezes."""
        for name in self.frozen_names:
            parameters[name].requires_grad_(False)
        named = {name: weight for name, weight in parameters.items() if weight.requires_grad}
        self.frozen = {name: weight for name, weight in parameters.items() if name not in named}
        """Weights that are never trained, by name: those of frozen groups, and those under adapters."""
        self.buffers = module_state.buffers(module)
        """Tensors of the module's state that are not weights, by name. No step changes them."""
        self.names = list(named)
        self.weights = list(named.values())
        decays = _decayed(module)
        # Numerics version 1 treated `project_emb` as an embedding.
        self._decays_since = {
            name: math.inf if weight not in decays else 2 if "_emb." in name else 1
            for name, weight in named.items()
        }
        self.optimizer = AdamW(fused=fused)
        hidden = hidden_matrices(module)
        self._muon = Muon(
            {named[name]: hidden[named[name]] for name, rule in self.rules.items() if rule == "muon"},
            momentum=config.momentum,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        self.configure(config, own)
        for name, weight in named.items():  # now, so that the first update cannot run out of memory
            if self.rules[name] == "adamw":
                self.optimizer.allocate(weight)
        self.updates = 0
        """Number of steps that trained this group."""
        self.ema = (average or self._copy(module)) if config.ema_decay else None
        """The module with the moving average of the weights, if the run keeps one."""

    def configure(
        self, config: OptimizerConfig, own: Matched, numerics_version: int = NUMERICS_VERSION
    ) -> None:
        """Apply new settings. They must freeze the same weights, and keep an average or not, as before."""
        alike: dict[tuple[str, float, float], list[Tensor]] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            group = own.get(name)
            scale = 1.0 if group is None else group.lr_scale
            decay = config.weight_decay
            if group is not None and group.weight_decay is not None:
                decay = group.weight_decay
            if numerics_version < self._decays_since[name]:
                decay = 0.0
            alike.setdefault((self.rules[name], scale, decay), []).append(weight)
        for optimizer in (self.optimizer, self._muon):
            optimizer.param_groups.clear()
        for (rule, scale, decay), weights in alike.items():
            settings = {"params": weights, "lr_scale": scale, "weight_decay": decay}
            if rule == "muon":
                self._muon.add_param_group({**settings, "momentum": config.momentum})
            else:
                self.optimizer.add_param_group({**settings, "betas": config.betas, "eps": config.eps})
        self._decay = config.ema_decay

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients. Weights without a gradient are left out."""
        return [own_part(weight.grad) for weight in self.weights if weight.grad is not None]

    def clear_gradients(self) -> None:
        """Delete the gradients and free their memory."""
        for weight in self.weights:
            weight.grad = None

    def update(self, rate: float) -> None:
        """Update the weights with their gradients and the learning rate `rate`, then the moving average."""
        for optimizer in (self.optimizer, self._muon):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            optimizer.step()
        self.updates += 1
        if self.ema is not None and self.weights:
            # min(d, (1+s)/(10+s)): a smaller decay at the start, so that the average follows quickly
            # (tf.train.ExponentialMovingAverage in TensorFlow).
            decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
            averages = [own_part(average) for average in self.averages().values()]
            torch._foreach_lerp_(averages, [own_part(weight.detach()) for weight in self.weights], 1 - decay)

    def averages(self) -> dict[str, Tensor]:
        """The moving averages of the weights, by name. Empty if the run keeps none."""
        if self.ema is None:
            return {}
        found = dict(self.ema.named_parameters())
        return {name: found[name] for name in self.names}

    def begin_average(self) -> None:
        """Set the moving average to the current weights, if the run keeps one."""
        if self.ema is not None:
            with torch.no_grad():
                for average, weight in zip(self.averages().values(), self.weights, strict=True):
                    own_part(average).copy_(own_part(weight))
                for name, buffer in module_state.buffers(self.ema).items():
                    buffer.copy_(self.buffers[name])
        self.copy_frozen_to_average()

    def copy_frozen_to_average(self) -> None:
        """Give the module of the average the weights that are never trained, if it has its own copy of them.

        It has one with several ranks: a divided module cannot share weights with another.
        """
        if self.ema is not None:
            found = dict(self.ema.named_parameters())
            with torch.no_grad():
                for name, weight in self.frozen.items():
                    if found[name] is not weight:
                        own_part(found[name]).copy_(own_part(weight))

    def _copy(self, module: nn.Module) -> nn.Module:
        """A copy of the module that shares the weights that are never trained."""
        memo = {id(weight): weight for weight in self.frozen.values()}
        return copy.deepcopy(module, memo).eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state and the number of updates, by name. Frozen parameters have no state."""
        state = {"updates": torch.tensor(self.updates, dtype=torch.int64)}
        for name, weight in zip(self.names, self.weights, strict=True):
            optimizer = self._muon if self.rules[name] == "muon" else self.optimizer
            for part, value in optimizer.state[weight].items():
                state[f"{name}.{part}"] = value
        return state


def _matched(modules: Mapping[str, nn.Module], config: OptimizerConfig) -> dict[str, Matched]:
    return matched(config.groups, {part: trainable(module) for part, module in modules.items()})


def _check_muon(modules: Mapping[str, nn.Module], config: OptimizerConfig) -> None:
    """Raise ConfigError if optimizer.name is muon, but Muon would train no weight."""
    if config.name == "muon" and not any(hidden_matrices(module) for module in modules.values()):
        raise ConfigError(
            "optimizer.name must be adamw for this model, got muon, which trains the nn.Linear modules in "
            "the model's `blocks`, and there are none; give the model an attribute `blocks`, the list of its "
            "layers, or use adamw"
        )


def counts(
    parts: Mapping[str, nn.Module | None],
    config: OptimizerConfig,
    size: Callable[[Tensor], int] = Tensor.numel,
) -> Counter[Rule]:
    """Count the numbers that AdamW trains and that Muon trains. Raises ConfigError like `make_groups`.

    Frozen weights are not counted. `size` returns how many numbers of a weight to count.
    """
    modules = {part: module for part, module in parts.items() if module is not None}
    _check_muon(modules, config)
    found: Counter[Rule] = Counter()
    for part, own in _matched(modules, config).items():
        for name, rule in rules(modules[part], config, own).items():
            if rule != "frozen":
                found[rule] += size(modules[part].get_parameter(name))
    return found


def listed(parts: Mapping[str, nn.Module | None], config: OptimizerConfig) -> list[str]:
    """A line for each parameter: how it is trained, its shape, and its name for `optimizer.groups`."""
    modules = {part: module for part, module in parts.items() if module is not None}
    return [
        f"{rule:6}  {' x '.join(map(str, modules[part].get_parameter(name).shape)):>14}  {part}.{name}"
        for part, own in _matched(modules, config).items()
        for name, rule in rules(modules[part], config, own).items()
    ]


def make_groups(
    parts: Mapping[str, nn.Module | None],
    config: OptimizerConfig,
    device: torch.device,
    *,
    bf16: bool,
    averages: Mapping[str, nn.Module],
) -> dict[str, Group]:
    """Make a `Group` for each network that is not None. Raises ConfigError if the settings do not fit."""
    modules = {part: module for part, module in parts.items() if module is not None}
    _check_muon(modules, config)
    matches = _matched(modules, config)
    on_gpu = device.type == "cuda"
    fused = on_gpu or device.type == "cpu"
    return {
        part: Group(
            module, config, matches[part], fused=fused, bf16=bf16 and on_gpu, average=averages.get(part)
        )
        for part, module in modules.items()
    }


def configure(
    groups: Mapping[str, Group], current: OptimizerConfig, config: OptimizerConfig, numerics_version: int
) -> None:
    """Apply new settings to all groups. Raises ValueError, and changes nothing, if they do not fit."""
    if config.name != current.name or bool(config.ema_decay) != bool(current.ema_decay):
        key = "name" if config.name != current.name else "ema_decay"
        raise ValueError(f"optimizer.{key} was {getattr(config, key)!r} and is now {getattr(current, key)!r}")
    try:
        names = {part: [*group.names, *sorted(group.frozen_names)] for part, group in groups.items()}
        matches = matched(config.groups, names)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    for part, group in groups.items():
        different = sorted(group.frozen_names ^ frozen(matches[part]))
        if different:
            was, now = ("trained", "frozen") if different[0] in group.frozen_names else ("frozen", "trained")
            others = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise ValueError(f"optimizer.groups: {part}.{different[0]}{others} was {was} and is now {now}")
    for part, group in groups.items():
        group.configure(config, matches[part], numerics_version)


def clip(groups: Iterable[Group], limit: float | None, ranks: Ranks) -> Tensor:
    """Scale the gradients to a global norm of at most `limit`. Returns the norm before scaling, fp32 []."""
    gradients = [gradient for group in groups for gradient in group.gradients()]
    norm = ranks.norm(torch.nn.utils.get_total_norm(gradients))
    if limit is not None and gradients:
        # min(1, limit/norm). Non-finite gradients stay non-finite, and the step is then skipped.
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
