"""Gives weights that this rank's rows did not use a gradient of 0, because another rank may have used them.

For example, the positions of a rank may choose some experts of a layer, and those of another rank other ones.
`fully_shard` adds up only the gradients that exist. If other ones existed on another rank, it would add the
gradients of different weights, or wait forever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


class UnusedWeights:
    """The divided weights of this rank, and which of them had a gradient in this step."""

    def __init__(self) -> None:
        self._weights: list[Any] = []
        """`fully_shard`'s descriptions of the weights."""
        self._used = bytearray()
        self._counts = True

    @property
    def used(self) -> bytes:
        """A byte for each weight: 1 if this rank computed a gradient since the last `forget`, or else 0."""
        return bytes(self._used)

    def watch(self, unit: FSDPModule, check: Callable[[], None] | None = None) -> None:
        """Complete the gradients of a unit in each backward pass. `check` is called before."""
        group: Any = unit._get_fsdp_state()._fsdp_param_group
        if group is None:  # it has no weights
            return
        first = len(self._weights)
        self._weights += group.fsdp_params
        self._used += bytes(len(group.fsdp_params))
        # `set_reduce_scatter_unused_params` of torch 2.13 does not tell which weights were not used.
        post_backward = group.post_backward

        def completed(*given: Any) -> None:
            if check is not None:
                check()
            for number, each in enumerate(group.fsdp_params, first):
                weight = getattr(each, "_unsharded_param", None)
                if weight is None or not weight.requires_grad:
                    continue
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                elif self._counts:
                    self._used[number] = 1
            post_backward(*given)

        group.post_backward = completed

    def pause(self) -> None:
        """Count no weight as used until `forget`: this rank only computes empty parts, without rows."""
        self._counts = False

    def forget(self) -> None:
        """Begin another step."""
        self._counts = True
        self._used[:] = bytes(len(self._used))

    def delete(self, used: Sequence[bytes]) -> None:
        """Delete the gradients of weights that no rank used. `used` is that of each rank."""
        for weight, *flags in zip(self._weights, *used, strict=True):
            if not any(flags):
                weight.sharded_param.grad = None
