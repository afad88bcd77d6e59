"""The Muon optimizer: momentum with orthogonalised updates, for the matrices in a network's blocks.

Sources: K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the iteration, its
coefficients, Nesterov momentum, and which weights it is for); J. Liu et al. 2025, "Muon is scalable for LLM
training" (weight decay, and the scale of the updates). `torch.optim.Muon` computes the same, but always in
bfloat16, and treats a stack of several matrices as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskwire_server.training.adamw import Optimizer
from maskwire_server.training.ranks_interface import assign, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: the steepest slope at 0 that still keeps the values close to 1."""
ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_ADAMW_RMS = 0.2


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An approximation of U V^T, where U S V^T is the singular value decomposition of `matrix`.

    It is computed in `dtype`. With X scaled to a norm of 1, the polynomial p(x) = a x + b x^3 + c x^5 maps X
    to a X + (b A + c A^2) X, where A = X X^T. This keeps U and V and maps each singular value s to p(s), so
    no decomposition is needed. Applied five times, p maps values from 0.01 to 1 to values from 0.68 to 1.14,
    and smaller values grow by a factor of up to a^5 = 485.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = (matrix / matrix.norm().clamp(min=_SMALLEST_NORM)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:  # so that A is the smaller of X X^T and X^T X
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def update_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonalised matrix the root mean square of AdamW's updates, about 0.2.

    U V^T, of shape [m, n], has min(m, n) singular values of 1, so its squares sum to min(m, n), and their
    mean is 1 / max(m, n). With this factor, learning rate and weight decay have the same effect as for AdamW
    (Liu et al.).
    """
    return _ADAMW_RMS * math.sqrt(max(rows, columns))


def hidden_matrices(network: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The weights of the linear maps in `network.blocks`, each with the row counts of its matrices.

    A linear map can stack several matrices: Q, K and V, or the two halves of a SwiGLU. The parent module of
    such a map lists their row counts in `stacked_rows`, by the name of the map. A network without blocks has
    no hidden matrices. Raises ValueError if the counts do not add up to the rows of the weight.
    """
    found: dict[Tensor, tuple[int, ...]] = {}
    for block in getattr(network, "blocks", ()):
        if isinstance(block, nn.Linear):
            found[block.weight] = (block.out_features,)
        for parent in block.modules():
            stacked: Mapping[str, tuple[int, ...]] = getattr(parent, "stacked_rows", {})
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    rows = stacked.get(name, (child.out_features,))
                    if sum(rows) != child.out_features:
                        raise ValueError(
                            f"stacked_rows[{name!r}] must sum to {child.out_features}, got {rows}"
                        )
                    found[child.weight] = rows
    return found


class Muon(Optimizer):
    """The Muon optimizer.

    For each matrix w with gradient g: m = mu m + (1 - mu) g, then w = (1 - lr decay) w - lr scale
    NS((1 - mu) g + mu m), where NS is `orthogonalized` and scale is `update_scale`.
    """

    def __init__(
        self, rows: Mapping[Tensor, tuple[int, ...]], *, momentum: float, dtype: torch.dtype
    ) -> None:
        """`rows` maps each weight to the row counts of its matrices.

        `dtype` is the type in which updates are orthogonalised.
        """
        super().__init__(momentum=momentum)
        self._rows = dict(rows)
        self._dtype = dtype
        for weight in rows:  # allocated now, so that the first update cannot run out of memory
            self.state[weight] = {"momentum": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight]["momentum"].lerp_(weight.grad, 1 - momentum)
                direction = weight.grad.lerp(average, momentum)  # Nesterov's
                weight.mul_(1 - rate * group["weight_decay"])
                rows = self._rows[weight]
                # Each rank that holds a part of the matrix computes the whole step.
                matrix = whole(weight)
                for part, towards in zip(matrix.split(rows), whole(direction).split(rows), strict=True):  # type: ignore[no-untyped-call]
                    step = orthogonalized(towards, self._dtype).to(part.dtype)
                    part.add_(step, alpha=-rate * update_scale(*part.shape))
                if matrix is not weight:
                    assign(weight, matrix)
