"""The operands of a model's output layer, from which the logits are computed.

Letters: m packed positions, d width of the embeddings, v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """The operands of x w^T + b, the logits of packed positions."""

    x_md: Tensor
    """Shape [m, d]; or, for a model without a linear output layer, the logits themselves, of shape [m, v]."""
    weight_vd: Tensor | None
    """None if `x_md` holds the logits."""
    bias_v: Tensor | None = None

    def logits(self) -> Tensor:
        """Compute the logits of all packed positions, a tensor of shape [m, v]."""
        if self.weight_vd is None:
            return self.x_md
        v = self.weight_vd.shape[0]
        return F.linear(self.x_md, aligned(self.weight_vd), aligned(self.bias_v))[..., :v]


@overload
def aligned(rows: Tensor) -> Tensor: ...


@overload
def aligned(rows: Tensor | None) -> Tensor | None: ...


def aligned(rows: Tensor | None) -> Tensor | None:
    """Pad a weight or bias on CUDA with rows of zeros to a multiple of 8 rows. Leave others unchanged.

    Matrix products of other sizes, such as a vocabulary of 8,193, use kernels without aligned loads, which
    run at a fifth of the speed (docs/benchmarks.md, P10).
    """
    if rows is None or rows.device.type == "cpu" or rows.shape[0] % 8 == 0:
        return rows
    return torch.cat((rows, rows.new_zeros(-rows.shape[0] % 8, *rows.shape[1:])))
