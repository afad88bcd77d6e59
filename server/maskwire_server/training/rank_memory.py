"""The memory that each rank needs, in every layout of replicate x shard, from the shapes of the tensors.

A rank holds a part of every weight, gradient, moment and average (`weight_partition.part_size`). During a
step it gathers more (torch's `fully_shard`): the weights outside the blocks, from the forward pass to the
end of the backward pass, and their whole gradients; and the weights and gradients of two blocks, because one
block is communicated while another is computed. During the backward pass of a micro-batch, its activations
are freed while its gradients are allocated, in addition to those of the batch: only the
larger of the two is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwire_server.config import (
    DistributedConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ServeConfig,
)
from maskwire_server.errors import ConfigError
from maskwire_server.training import numerics, optimizers
from maskwire_server.training.footprint import (
    Footprint,
    Term,
    available,
    gives_logits,
    of_activations,
    of_logits,
    size_text,
)
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.weight_partition import check_shardable, is_replicated_only, part_size


@dataclass(frozen=True)
class Machines:
    """The machines to plan for: their ranks and the memory of each rank."""

    ranks: int
    """The number of ranks on each host."""
    hosts: int = 1
    memory: int | None = None
    """Bytes for each rank. None: the free memory of this machine, which ranks on the CPU share."""

    @property
    def size(self) -> int:
        """The number of ranks on all hosts."""
        return self.ranks * self.hosts


@dataclass(frozen=True)
class Held:
    """How many numbers a rank holds in its parts of the weights, gradients, optimizer state and average."""

    weights: int
    gradients: int
    adamw: int
    """Weights that AdamW trains: each has two moments."""
    muon: int
    """Weights that Muon trains: each has a momentum."""
    average: int

    @property
    def size(self) -> int:
        """The size of all these numbers in bytes, at 4 bytes per number."""
        return 4 * (self.weights + self.gradients + 2 * self.adamw + self.muon + self.average)

    def __str__(self) -> str:
        terms = {
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW's two moments 2 x": self.adamw,
            "Muon's momentum": self.muon,
            "average": self.average,
        }
        numbers = " + ".join(f"{what} {count:,}" for what, count in terms.items() if count)
        return f"({numbers}) x 4 bytes = {size_text(self.size)}"


@dataclass(frozen=True)
class Room:
    """What a rank needs besides its part of the state, and the memory that is available, in bytes."""

    gathered: int
    computed: int
    """Activations and logits."""
    leader: int
    """What only the leader needs."""
    build: int
    """The whole model, before it is divided; 0 if it is not built in this memory."""
    memory: int
    sharing: int
    """How many ranks share the memory."""

    def _needed(self, part: Held) -> int:
        during_step = self.gathered + max(self.computed, 4 * part.gradients)
        return max(self.sharing * (part.size + during_step) + self.leader, self.sharing * self.build)

    def fits(self, part: Held) -> bool:
        """Whether the memory is enough for every rank with such a part of the state, also for the leader."""
        return self._needed(part) <= self.memory

    def sum(self, part: Held) -> str:
        """A line of text: the terms, their total, and whether the total fits in the memory."""
        terms = {"state": part.size, "gathered": self.gathered, "activations and logits": self.computed}
        if self.computed < 4 * part.gradients:
            del terms["activations and logits"]
            terms["gradients of a micro-batch"] = 4 * part.gradients
        ranks = f"{self.sharing} ranks x " if self.sharing > 1 else ""
        words = " + ".join(f"{name} {size_text(size)}" for name, size in terms.items())
        needed = self._needed(part)
        verdict = "fits" if self.fits(part) else "does not fit"
        if needed == self.sharing * self.build:
            return f"{ranks}to build the model = {size_text(needed)} of {size_text(self.memory)}: {verdict}"
        return (
            f"{ranks}({words}) + leader {size_text(self.leader)} = {size_text(needed)} of "
            f"{size_text(self.memory)}: {verdict}"
        )


def held(networks: Networks, optimizer: OptimizerConfig, shard: int, index: int = 0) -> Held:
    """What the rank at `index` of `shard` ranks holds. Rank 0 holds the most. Raises ConfigError."""

    def size(weight: Tensor) -> int:
        return part_size(weight.shape, shard, index)

    learning = _learning(networks, optimizer, size)
    weights = sum(map(size, networks.parameters()))
    average = weights if optimizer.ema_decay else 0  # also of weights that are frozen
    return Held(weights, learning.total(), learning["adamw"], learning["muon"], average)


def layouts(
    model: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    serve: ServeConfig,
    distributed: DistributedConfig,
    machines: Machines,
) -> Footprint:
    """Report the memory that each rank needs in each layout, and recommend a layout.

    `Footprint.fits` is whether the configured layout is possible and fits. Raises ConfigError if the device
    does not exist, if `optimizer.groups` does not fit the parameters, or if the model cannot be trained by
    several ranks.
    """
    device = _device(serve, machines)
    with torch.device("meta"):
        networks = Networks(model, objective)
    modules = [module for module in (networks.generator, networks.critic) if module is not None]
    for module in modules:
        check_shardable(module, 1)
    whole = held(networks, optimizer, 1)
    positions, of_what = _positions(model, serve, machines.size, device)
    activations = of_activations(model, objective, serve, networks, positions)
    logits = of_logits(model, device)
    if 4 * whole.weights <= available(torch.device("cpu")) and gives_logits(model, objective):
        logits = of_logits(model, device, all_of=positions)
    gathered = _gathered(networks, optimizer, copies=device.type == "cpu")
    copy = Term(f"whole weights for evaluations, {whole.weights:,} x 4 bytes", 4 * whole.weights)
    snapshot = _snapshot(whole, optimizer)
    copies = 2 if optimizer.ema_decay else 1  # of the weights: one for the average
    build = Term(
        f"to build the model, {machines.ranks} ranks x {copies} x {whole.weights:,} weights x 4 bytes",
        machines.ranks * copies * 4 * whole.weights,
    )
    on_cpu = device.type == "cpu"
    memory, sharing = _memory(device, machines)
    leaders = copy.size + snapshot.size * on_cpu
    built = copies * 4 * whole.weights * on_cpu  # the host memory of a GPU's machine is another
    room = Room(gathered.size, activations.size + logits.size, leaders, built, memory, sharing)
    frozen = whole.weights - whole.gradients
    ranks = f"{machines.ranks} on each of {machines.hosts} hosts = {machines.size}"
    lines = [
        f"parameters      {whole.weights:,}" + f", {frozen:,} frozen" * bool(frozen),
        f"ranks           {machines.size if machines.hosts == 1 else ranks}; on {device.type}, "
        f"{size_text(memory)} {'for all of them' if sharing > 1 else 'for each'}",
        f"gathered        {gathered}",
        f"activations     {of_what} x {activations}",
        f"logits          {logits}",
        f"leader          {copy}",
        f"host memory     {build}; on the leader's host, for a snapshot, {snapshot}",
    ]
    fitting = []
    for shard in (each for each in range(1, machines.size + 1) if machines.size % each == 0):
        lines.append(f"layout          replicate {machines.size // shard} x shard {shard}")
        if shard > 1 and any(map(is_replicated_only, modules)):
            lines.append("  not possible: a model without `blocks`, a list of its layers, has shard = 1")
            continue
        part = held(networks, optimizer, shard)
        rule = "" if shard == 1 else f"ceil(rows / {shard}) rows of each tensor: "
        lines += [f"  state         {rule}{part}", f"  together      {room.sum(part)}"]
        fitting += [shard] * room.fits(part)
    configured = distributed.shard or machines.size // distributed.replicate
    fits = configured in fitting
    lines += [
        f"configured      replicate {distributed.replicate} x shard {configured}: "
        f"{'fits' if fits else 'cannot be used, see above'}",
        _advice(fitting, machines),
    ]
    parts = {"generator": networks.generator, "critic": networks.critic}
    return Footprint(lines, fits, optimizers.listed(parts, optimizer))


def _learning(
    networks: Networks, optimizer: OptimizerConfig, size: Callable[[Tensor], int]
) -> Counter[optimizers.Rule]:
    parts = {"generator": networks.generator, "critic": networks.critic}
    return optimizers.counts(parts, optimizer, size)


def _device(serve: ServeConfig, machines: Machines) -> torch.device:
    """The device to plan for. If `Machines.memory` is set, this machine need not have that device."""
    if machines.memory is not None:
        return torch.device("cpu" if serve.device == "cpu" else "cuda")
    device = numerics.choose_device(serve.device)
    if device.type == "cuda" and torch.cuda.device_count() < machines.ranks:
        raise ConfigError(
            f"--ranks: must be at most {torch.cuda.device_count()}, the number of CUDA devices of this "
            f"machine, got {machines.ranks}; to plan for other machines, add --memory with the memory of a "
            "device, for example 80GiB"
        )
    return device


def _memory(device: torch.device, machines: Machines) -> tuple[int, int]:
    """The available memory in bytes, and the number of ranks that share it."""
    if machines.memory is not None:
        return machines.memory, 1
    if device.type == "cpu":
        return available(device), machines.ranks
    return min(available(torch.device("cuda", index)) for index in range(machines.ranks)), 1


def _positions(model: ModelConfig, serve: ServeConfig, ranks: int, device: torch.device) -> tuple[int, str]:
    """The number of positions in a rank's micro-batch, and a text that says where it comes from.

    A rank has at most ceil(rows / ranks) of the rows of a batch. With n columns, that is less than
    rows x n / ranks + n positions.
    """
    budget = serve.micro_batch_tokens or numerics.default_budget(device)
    share = serve.max_batch_tokens // ranks + model.max_seq_len
    if share >= budget:
        return budget, f"{budget:,} positions per micro-batch"
    return share, (
        f"({serve.max_batch_tokens:,} positions of a batch / {ranks} ranks + {model.max_seq_len:,} of a row)"
    )


def _gathered(networks: Networks, optimizer: OptimizerConfig, *, copies: bool) -> Term:
    """What a rank gathers in a step: weights and gradients outside the blocks, and those of two blocks.

    Both blocks count as the largest one. With `copies`, this includes the extra copy of a gathered tensor
    that gloo makes on the CPU.
    """

    def numbers(weights: Set[Tensor]) -> tuple[int, int]:
        def size(weight: Tensor) -> int:
            return weight.numel() if weight in weights else 0

        return sum(map(size, networks.parameters())), _learning(networks, optimizer, size).total()

    blocks = [set(block.parameters()) for each in networks.backbones for block in each.blocks]
    outside = set(networks.parameters()).difference(*blocks)
    largest = max(blocks, key=lambda block: sum(weight.numel() for weight in block), default=set())
    count = min(2, len(blocks))
    (of_root, learning), (of_block, learning_of_block) = numbers(outside), numbers(largest)
    of_copy = max(of_root, of_block) if copies else 0
    return Term(
        f"(outside the blocks, weights {of_root:,} + gradients {learning:,}; of {count} blocks, {count} x "
        f"(weights {of_block:,} + gradients {learning_of_block:,})"
        + f"; gloo's copy of the largest of them, {of_copy:,}" * copies
        + ") x 4 bytes",
        4 * (of_root + learning + count * (of_block + learning_of_block) + of_copy),
    )


def _snapshot(whole: Held, optimizer: OptimizerConfig) -> Term:
    """The size of a copy of the whole state in host memory, without the averages of frozen weights."""
    average = whole.gradients if optimizer.ema_decay else 0
    numbers = whole.weights + 2 * whole.adamw + whole.muon + average
    return Term(f"{numbers:,} numbers x 4 bytes", 4 * numbers)


def _advice(fitting: list[int], machines: Machines) -> str:
    """A line that recommends the layout with the smallest shard that fits, if possible within a host."""
    if not fitting:
        return (
            "no layout fits: use more ranks or devices with more memory, lower serve.micro_batch_tokens, set "
            "serve.activation_checkpointing, or lower model.dim, model.depth or model.num_tokens"
        )
    within = [shard for shard in fitting if machines.ranks % shard == 0]
    shard = min(within or fitting)
    where = " within a host" if within else ", across hosts: their network carries the gathered weights"
    return (
        f"recommended     --set distributed.replicate={machines.size // shard} "
        f"--set distributed.shard={shard}: the smallest shard that fits{where}"
    )
