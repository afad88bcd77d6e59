"""The output layer of a model, before its logits are computed.

Letters: m packed positions, d width of the embeddings, v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """Packed positions' logits x w^T + b, before they are computed."""

    x_md: Tensor
    """[m, d], or the logits themselves, [m, v], of a model without a linear output layer."""
    weight_vd: Tensor | None
    """None: `x_md` holds the logits."""
    bias_v: Tensor | None = None

    def logits(self) -> Tensor:
        """[m, v]."""
        return self.x_md if self.weight_vd is None else F.linear(self.x_md, self.weight_vd, self.bias_v)
