"""Which part of each weight a rank holds, and which models cannot be divided."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from maskwire_server.errors import ConfigError
from maskwire_server.training.models.backbone import Backbone


def part_size(shape: Sequence[int], shard: int, index: int = 0) -> int:
    """How many numbers of a tensor of this shape the rank at `index` of `shard` ranks holds.

    Each rank has ceil(rows / shard) consecutive rows; the last ones have fewer, or none (torch's `Shard(0)`).
    The first rank has the most numbers, and the other ranks reserve the same memory for their parts.
    """
    rows, *others = shape
    most = -(-rows // shard)
    own = max(0, min(most, rows - index * most))
    for size in others:
        own *= size
    return own


def check_shardable(module: nn.Module, shard: int) -> None:
    """Raise ConfigError if a network cannot be trained by groups of `shard` ranks that each hold a part."""
    for name, weight in module.named_parameters():
        if not weight.ndim:
            raise ConfigError(
                f"distributed: the weight {name} is a scalar, which cannot be divided; make it a vector "
                "of one number"
            )
    if shard > 1 and is_replicated_only(module):
        raise ConfigError(
            f"distributed.shard must be 1, got {shard}: a model without `blocks` (a list of its layers) can "
            "only be replicated; set distributed.replicate to the number of ranks"
        )


def is_replicated_only(module: nn.Module) -> bool:
    """Whether a network has no blocks, so that a rank would have to gather all its weights at once."""
    return isinstance(module, Backbone) and not len(module.blocks)
