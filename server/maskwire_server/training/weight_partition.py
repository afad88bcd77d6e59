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
    _check_separate(module)
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


def _check_separate(module: nn.Module) -> None:
    """Raise ConfigError if a block is listed twice, or shares a weight with another block or the rest.

    Ranks gather and free the weights of each block on their own.
    """
    blocks = list(module.blocks) if isinstance(module, Backbone) else []
    numbers = {id(block): number for number, block in enumerate(blocks)}
    if len(numbers) < len(blocks):
        twice = next(number for number, block in enumerate(blocks) if numbers[id(block)] != number)
        raise ConfigError(
            f"distributed: each layer must be in the model's `blocks` once, but blocks {twice} and "
            f"{numbers[id(blocks[twice])]} are the same module; list it once, even if it is called twice, or "
            "train with one process"
        )
    paths = {
        f"{path}.": numbers[id(child)]
        for path, child in module.named_modules(remove_duplicate=False)
        if id(child) in numbers
    }
    found: dict[int, tuple[int | None, str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        inside: list[int | None] = [number for path, number in paths.items() if name.startswith(path)]
        for block in inside or [None]:
            other, other_name = found.setdefault(id(weight), (block, name))
            if other != block:
                raise ConfigError(
                    f"distributed: the weight {name} of {_group(block)} is also the weight {other_name} of "
                    f"{_group(other)}; blocks of a model that is divided among ranks must not share weights "
                    "with other layers: give each its own, or train with one process"
                )


def _group(block: int | None) -> str:
    return "a layer outside the blocks" if block is None else f"block {block}"


def is_replicated_only(module: nn.Module) -> bool:
    """Whether a network has no blocks, so that a rank would have to gather all its weights at once."""
    return isinstance(module, Backbone) and not len(module.blocks)
