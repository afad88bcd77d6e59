"""Micro-batches: parts of a logical batch that fit the device, whose gradients are added up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from maskwire_server.training.objective import PartLosses


def row_lengths(valid_bn: Tensor) -> list[int]:
    """The columns of each row up to its last valid position, at least 1."""
    column_n = torch.arange(1, valid_bn.shape[1] + 1)
    lengths: list[int] = (valid_bn * column_n).amax(-1).clamp(min=1).tolist()
    return lengths


def split(lengths: Iterable[int], budget: int) -> Iterator[tuple[slice, int]]:
    """Consecutive rows with at most `budget` positions together, padding included, and at least one row.

    With each slice comes the length of its longest row.
    """
    start = stop = longest = 0
    for length in lengths:
        if stop > start and max(longest, length) * (stop + 1 - start) > budget:
            yield slice(start, stop), longest
            start, longest = stop, 0
        stop, longest = stop + 1, max(longest, length)
    if stop > start:
        yield slice(start, stop), longest


class BatchLosses:
    """The losses of a logical batch, summed over its micro-batches on the device."""

    def __init__(self, masked: int, maskable: int, device: torch.device, *, critic: bool) -> None:
        self.masked = masked
        self.maskable = maskable
        self._critic = critic
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of the generator's loss and the critic's, fp64 [2]."""

    def add(self, part: PartLosses) -> None:
        """Add the losses of one micro-batch."""
        critic = torch.zeros_like(part.generator) if part.critic is None else part.critic
        self.sums += torch.stack((part.generator, critic)).detach()

    def read(self, norm: Tensor) -> tuple[float, float | None, float]:
        """Generator loss, critic loss (None if it was not computed) and gradient norm.

        They are copied to the host together, because each copy waits for the device.
        """
        generator, critic, norm_value = torch.cat((self.sums, norm.double().view(1).to(self.sums))).tolist()
        return generator, critic if self._critic else None, norm_value
