"""The interface to the processes that train together, and its implementation for a single process.

torch.distributed is not imported here, so that a single process does not spend time on the import. `sharding`
implements the interface for several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskwire_server.training.block_calls import CallOrder
from maskwire_server.training.micro_batch_split import Part, split, split_by_length
from maskwire_server.training.shards import Piece


class Ranks:
    """The processes that train together. This class itself is for a single process."""

    rank = 0
    is_leader = True
    """Whether this rank is the leader, which gets the whole state for snapshots and evaluations."""
    cores: int | None = None
    """The CPU cores of this rank; None: all that the process may use."""
    is_sharded = False
    """Whether the weights are divided, and must be gathered to be read."""

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is the device of this rank; None: the device that `serve.device` names."""
        self.device = device

    @property
    def versions(self) -> dict[str, str]:
        """The layout of the ranks, on which results depend."""
        return {"world_size": "1"}

    def divide(
        self,
        networks: Mapping[str, nn.Module | None],
        *,
        with_averages: bool,
        orders: Mapping[str, CallOrder] | None = None,
    ) -> dict[str, nn.Module]:
        """Divide the weights of networks among the ranks, and move this rank's part to its device.

        Returns copies of the networks for the moving averages, by name, divided in the same way. A single
        process divides nothing and returns no copies: `optimizers.Group` then makes them. `orders` are those
        in which the networks must call their blocks.
        """
        del networks, with_averages, orders
        return {}

    def release(self, module: nn.Module) -> None:
        """Free the gathered copies of weights, because a step has changed the weights."""

    def parts(self, lengths: Sequence[int], budget: int, smallest: int | None) -> list[Part | None]:
        """This rank's parts of a logical batch, each of at most `budget` positions.

        A part of None is empty. It is computed too, so that no other rank waits forever. `smallest` is as in
        `split_by_length`; None: the parts have the order of the batch, as before numerics version 3.
        """
        if smallest is None:
            return list(split(lengths, budget))
        return list(split_by_length(lengths, range(len(lengths)), budget, smallest))

    def begin_empty_part(self) -> None:
        """Called before each empty part, whose gradients are 0. A single process has none."""

    def add(self, sums: Tensor) -> Tensor:
        """Add up a tensor over all ranks, and return the sum."""
        return sums

    def share(self, full: Tensor | None, like: Tensor) -> Tensor:
        """Send a whole tensor from the leader to every rank, and return it. Other ranks pass None.

        `like` is a tensor of the same shape and type.
        """
        assert full is not None
        assert full.shape == like.shape
        return full

    def piece(self, live: Tensor, number: int) -> Piece | None:
        """The part of a tensor that this rank saves; None if other ranks save all of it.

        `number` is the position of the tensor among the tensors of its file.
        """
        del number
        return Piece(live, (0,) * live.ndim, tuple(live.shape))

    def norm(self, of_part: Tensor) -> Tensor:
        """The norm of a vector that is divided like the weights. `of_part` is the norm of a rank's part."""
        return of_part

    def agree(self, facts: str, weights: Iterable[Tensor] = ()) -> None:
        """Raise StateLost unless all ranks have the same results of a step, and all copies the same weights.

        `facts` is the text of the results. `weights` are tensors that are divided among the ranks of a copy.
        Deletes the gradients of weights that no rank used.
        """


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class a single process never imports


def whole(tensor: Tensor) -> Tensor:
    """Gather a divided tensor from the ranks, and return it whole. Every rank must call this."""
    divided: Any = tensor
    full: Tensor = divided.full_tensor() if _is_divided(tensor) else tensor
    return full


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a divided tensor, in the same memory; otherwise the tensor itself."""
    divided: Any = tensor
    part: Tensor = divided.to_local() if _is_divided(tensor) else tensor
    return part


def divided_like(full: Tensor, live: Tensor) -> Tensor:
    """This rank's part of the whole tensor `full`, divided in the same way as `live`."""
    if not _is_divided(live):
        return full
    from torch.distributed.tensor import distribute_tensor

    divided: Any = live
    there = full.to(divided.to_local().device)
    return distribute_tensor(there, divided.device_mesh, divided.placements, src_data_rank=None).to_local()


def assign(live: Tensor, full: Tensor) -> None:
    """Copy the whole tensor `full` into `live`. If `live` is divided, copy only this rank's part."""
    own_part(live).copy_(divided_like(full, live))
