"""A logical batch as tensors, and how its rows are read in parts.

Letters: r rows as sent, n their columns, s sequences, b sequences of a part, c columns of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maskwire_server.batch import Batch
from maskwire_server.training.device_copies import upload


@dataclass(frozen=True)
class TensorBatch:
    """The ids of a logical batch, int64 [r, n], and its masks, bool [r, n].

    Each row is one sequence, or consists of several sequences. A sequence is what the objective calls a row:
    it has its own mask, and attends only to itself.
    """

    ids_rn: Tensor
    valid_rn: Tensor
    prompt_rn: Tensor
    starts_s: Tensor | None = None
    """int64: where each sequence starts in the flattened grid; None: each row is one sequence."""
    sizes_s: Tensor | None = None
    """int64: the columns of each sequence; None if `starts_s` is None."""

    @staticmethod
    def of(batch: Batch, pad_id: int | None) -> TensorBatch:
        """Convert a batch to tensors. Ids equal to `pad_id` are padding, unless the batch has row lengths."""
        ids, valid, prompt = (torch.from_numpy(grid) for grid in batch.dense(pad_id))
        if batch.segment_ids is None:
            return TensorBatch(ids, valid, prompt)
        starts, sizes = batch.segments()
        return TensorBatch(ids, valid, prompt, torch.from_numpy(starts), torch.from_numpy(sizes))

    @cached_property
    def maskable_rn(self) -> Tensor:
        """The positions that can be masked, bool [r, n]: neither padding nor part of a prompt."""
        return self.valid_rn & ~self.prompt_rn

    @cached_property
    def maskable_s(self) -> Tensor:
        """The number of maskable positions of each sequence, int64."""
        return self._counts(self.maskable_rn)

    @cached_property
    def valid_s(self) -> Tensor:
        """The number of valid positions of each sequence, int64."""
        return self._counts(self.valid_rn)

    def _counts(self, grid_rn: Tensor) -> Tensor:
        if self.starts_s is None or self.sizes_s is None:
            return grid_rn.sum(-1)
        before = torch.cat((self.starts_s.new_zeros(1), grid_rn.flatten().cumsum(0)))
        return before[self.starts_s + self.sizes_s] - before[self.starts_s]

    @cached_property
    def lengths(self) -> list[int]:
        """The number of columns of each sequence, up to its last valid position, and at least 1."""
        if self.sizes_s is not None:
            sizes: list[int] = self.sizes_s.tolist()
            return sizes
        column_n = torch.arange(1, self.valid_rn.shape[1] + 1, device=self.valid_rn.device)
        lengths: list[int] = (self.valid_rn * column_n).amax(-1).clamp(min=1).tolist()
        return lengths

    def to(self, device: torch.device) -> TensorBatch:
        """Copy the batch from host memory to a device."""
        ids, valid, prompt = (upload(grid, device) for grid in (self.ids_rn, self.valid_rn, self.prompt_rn))
        if self.starts_s is None or self.sizes_s is None:
            return TensorBatch(ids, valid, prompt)
        starts_s, sizes_s = upload(self.starts_s, device), upload(self.sizes_s, device)
        return TensorBatch(ids, valid, prompt, starts_s, sizes_s)

    def take(self, row_b: list[int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ids, valid positions and maskable positions of some sequences, each [b, c].

        `row_b` holds the indices of the sequences, and `columns` is c, the number of columns to read.
        """
        rows_b = upload(torch.tensor(row_b), self.ids_rn.device)
        if self.starts_s is None or self.sizes_s is None:
            consecutive = row_b == list(range(row_b[0], row_b[0] + len(row_b)))
            rows = slice(row_b[0], row_b[0] + len(row_b)) if consecutive else rows_b  # a slice copies nothing
            ids, valid, maskable = (grid[:, :columns][rows] for grid in self._grids)
            return ids, valid, maskable
        column_c = torch.arange(columns, device=rows_b.device)
        inside_bc = column_c < self.sizes_s[rows_b, None]
        at_bc = torch.where(inside_bc, self.starts_s[rows_b, None] + column_c, 0)
        ids, valid, maskable = (grid.flatten()[at_bc] for grid in self._grids)
        return ids.masked_fill(~inside_bc, 0), valid & inside_bc, maskable & inside_bc

    @property
    def _grids(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids_rn, self.valid_rn, self.maskable_rn
