"""Train one model with several processes, which divide its weights and the rows of a batch.

The ranks form a grid of `replicate` x `shard`. Within a row of the grid, each rank holds a part of every
weight, gradient and moment (torch's `fully_shard`); all rows of the grid hold the same values. The ranks
train on different rows of a logical batch, and the losses and gradients are those of the whole batch: losses
have the denominators of the logical batch, so gradients are summed, not averaged.

Every rank makes the same calls in the same order. The calls must not depend on anything that only one rank
knows: if a rank computed fewer parts than the others, the ranks would wait for each other forever.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from maskwire_server.errors import ConfigError, StateLost
from maskwire_server.training import weight_partition
from maskwire_server.training.block_calls import BlockCalls, CallOrder
from maskwire_server.training.micro_batch_split import Part, split, split_by_length
from maskwire_server.training.models.backbone import Backbone
from maskwire_server.training.ranks_interface import Ranks, own_part
from maskwire_server.training.shards import Piece
from maskwire_server.training.unused_weights import UnusedWeights

_HASH, _CHECKSUM = slice(32), slice(32, 40)  # in what ranks send one another to agree
_RESTART = "all ranks restart and recover the run from its journal, and no acknowledged step is lost"


class ManyRanks(Ranks):
    """The ranks that train together in torch's process group, which must be initialised."""

    is_sharded = True

    def __init__(
        self, device: torch.device, *, replicate: int = 1, leader: int = 0, timeout: timedelta | None = None
    ) -> None:
        """`timeout` limits each collective operation. Raises ConfigError for a wrong `replicate`."""
        super().__init__(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size % replicate:
            raise ConfigError(
                f"distributed.replicate: must divide the number of ranks, {self.size}, got {replicate}"
            )
        self.replicate = replicate
        self.leader = leader
        self.is_leader = self.rank == leader
        shard = self.size // replicate
        grid = {"replicate": replicate, "shard": shard} if replicate > 1 else {"shard": shard}
        # With replicate = 1, one dimension: with two, torch keeps a second copy of the gradients.
        self.mesh: DeviceMesh = init_device_mesh(device.type, (*grid.values(),), mesh_dim_names=(*grid,))
        self._shard_group = self.mesh.get_group("shard")
        self._copy = self.mesh.get_local_rank("replicate") if replicate > 1 else 0
        if timeout is not None:  # a mesh's groups do not inherit it from init_process_group
            for group in self.mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._history = b""
        self._unused = UnusedWeights()

    def use_device(self) -> None:
        """Make this rank's device the default of the calling thread, as NCCL requires."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def versions(self) -> dict[str, str]:
        """The layout (replicate x shard) and, on GPUs, the version and settings of NCCL.

        In another layout, or with another version or algorithm of NCCL, sums are rounded differently.
        """
        found = {"world_size": f"{self.replicate} x {self.size // self.replicate}"}
        if self.device is not None and self.device.type == "cuda":
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
            found |= {name.lower(): os.environ.get(name, "") for name in ("NCCL_ALGO", "NCCL_PROTO")}
        return found

    def record(self, order: bytes) -> None:
        """Record an order from the leader that this rank executes. `agree` compares all ranks' records."""
        self._history = hashlib.sha256(self._history + order).digest()

    def divide(
        self,
        networks: Mapping[str, nn.Module | None],
        *,
        with_averages: bool,
        orders: Mapping[str, CallOrder] | None = None,
    ) -> dict[str, nn.Module]:
        """Divide the networks and their copies for moving averages among the ranks. Returns the copies.

        From now on, a pass that calls a network's blocks in another order than in `orders` raises
        ConfigError. Raises ConfigError if a network cannot be divided.
        """
        modules = {name: module for name, module in networks.items() if module is not None}
        averages = {name: copy.deepcopy(module) for name, module in modules.items()} if with_averages else {}
        for module in (*modules.values(), *averages.values()):
            self._shard(module)
        for name, module in modules.items():
            check = None
            if orders and name in orders and isinstance(module, Backbone):
                check = BlockCalls(module, orders[name]).check_complete
            for unit in _sharded(module):  # the first is the network itself
                self._unused.watch(unit, check)
                check = None
        return {name: module.eval().requires_grad_(False) for name, module in averages.items()}

    def _shard(self, module: nn.Module) -> None:
        """Divide the weights of each block, then all other weights. Raises ConfigError if that is impossible.

        The blocks' weights are gathered one block at a time. The others stay gathered from the forward pass
        to the end of the backward pass, because the output layer reads them outside of `forward`.
        """
        weight_partition.check_shardable(module, self.size // self.replicate)
        blocks = list(module.blocks) if isinstance(module, Backbone) else []
        for block in blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        fully_shard(module, mesh=self.mesh, reshard_after_forward=False)
        for each in _sharded(module):
            each.set_gradient_divide_factor(1.0)  # each loss has the denominator of the logical batch
            each.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums

    def release(self, module: nn.Module) -> None:
        """Free gathered weights, so that the next pass gathers them again.

        A pass without gradients leaves the weights outside the blocks gathered, so that later passes would
        not see a change of the divided weights.
        """
        for each in _sharded(module):
            each.reshard()
        self._unused.forget()

    def parts(self, lengths: Sequence[int], budget: int, smallest: int | None) -> list[Part | None]:
        """This rank's parts of a logical batch.

        All ranks get the same number of parts, and about the same number of positions.
        """
        if smallest is None:  # consecutive rows for each rank
            bounds = [rank * len(lengths) // self.size for rank in range(self.size + 1)]
            of_ranks = [
                [
                    ([start + row for row in rows], columns)
                    for rows, columns in split(lengths[start:stop], budget)
                ]
                for start, stop in itertools.pairwise(bounds)
            ]
        else:
            longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
            of_ranks = [
                list(split_by_length(lengths, longest_first[rank :: self.size], budget, smallest))
                for rank in range(self.size)
            ]
        own: list[Part | None] = list(of_ranks[self.rank])
        return own + [None] * (max(map(len, of_ranks)) - len(own))

    def begin_empty_part(self) -> None:
        """Count no weight as used until `release`. Empty parts come last."""
        self._unused.pause()

    def add(self, sums: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place, and return it."""
        dist.all_reduce(sums)
        return sums

    def share(self, full: Tensor | None, like: Tensor) -> Tensor:
        """Send a whole tensor from the leader to every rank, and return it."""
        there = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if full is not None:
            there.copy_(full)
        dist.broadcast(there, self.leader)
        return there

    def piece(self, live: Tensor, number: int) -> Piece | None:
        """The rows of a tensor that this rank saves, or None.

        Each replica saves some of the divided tensors. The leader saves the tensors that are not divided.
        """
        if not isinstance(live, DTensor):
            return super().piece(live, number) if self.is_leader else None
        if number % self.replicate != self._copy:
            return None
        _, offsets = compute_local_shape_and_global_offset(live.shape, live.device_mesh, live.placements)
        part = live.to_local()
        if not part.numel() and (live.numel() or any(offsets)):
            return None
        return Piece(part, tuple(offsets), tuple(live.shape))

    def norm(self, of_part: Tensor) -> Tensor:
        """The norm of a divided vector: the square root of the sum of the squares of its parts' norms."""
        if self.size == self.replicate:
            return of_part
        square = of_part.double().square()
        dist.all_reduce(square, group=self._shard_group)
        return square.sqrt().to(of_part.dtype)

    def which(self, flag: bool) -> list[int]:
        """The ranks on which `flag` is True. Every rank must call this."""
        return [rank for rank, found in enumerate(self._gather(bytes([flag]))) if found[0]]

    def agree(self, facts: str, weights: Iterable[Tensor] = ()) -> None:
        """Raise StateLost if ranks have other `facts` or orders, or if copies have other `weights`.

        The facts are sums over all ranks, which would not show that one copy of the model has other weights.
        Deletes the gradients of weights that no rank used, as one process has none.
        """
        own = hashlib.sha256(self._history + facts.encode()).digest()
        checksum = _checksum(weights if self.replicate > 1 else ()).to_bytes(8, "little", signed=True)
        found = self._gather(own + checksum + self._unused.used)
        hashes, checksums = ([each[part] for each in found] for part in (_HASH, _CHECKSUM))
        if other := [rank for rank, each in enumerate(hashes) if each != own]:
            raise StateLost(
                f"rank {self.rank} has the result {facts!r}, but ranks {other} have another result or "
                f"executed other orders; {_RESTART}"
            )
        shard = self.size // self.replicate
        with_same_part = range(self.rank % shard, self.size, shard)
        if other := [rank for rank in with_same_part if checksums[rank] != checksum]:
            raise StateLost(
                f"rank {self.rank} and ranks {other} have different weights, but hold the same part of the "
                f"model; {_RESTART}"
            )
        self._unused.delete([each[_CHECKSUM.stop :] for each in found])

    def _gather(self, own: bytes) -> list[bytes]:
        """The bytes of every rank, by rank. All ranks must pass the same number of bytes."""
        found = [torch.empty(len(own), dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, torch.frombuffer(bytearray(own), dtype=torch.uint8), group=self._control)
        return [each.numpy().tobytes() for each in found]


def _checksum(weights: Iterable[Tensor]) -> int:
    """The sum of this rank's parts, read as 64-bit integers, modulo 2^64. It is exact in any order."""
    sums = []
    for weight in weights:
        data = own_part(weight.detach()).contiguous().view(-1).view(torch.uint8)
        words = data.numel() // 8 * 8
        sums += [data[:words].view(torch.int64).sum(), data[words:].sum()]
    return int(torch.stack(sums).sum()) if sums else 0


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [each for each in module.modules() if isinstance(each, FSDPModule)]
