"""Models that know the distribution of the data, so that the right value of the loss is known.

`embed` turns the input into one-hot "embeddings" of the source's exact conditionals, which `project`
passes through as log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskwire_server.training.head import Head


class Oracle:
    """Networks whose generator is `log_probabilities(ids, masked)` -> [b, n, v]."""

    def __init__(self, mask_id: int, log_probabilities: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.mask_id = mask_id
        self.log_probabilities = log_probabilities
        self.seen: list[Tensor] = []

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        self.seen.append(ids_bn)
        found_bnv = self.log_probabilities(ids_bn, ids_bn == self.mask_id)
        return found_bnv if read_m is None else found_bnv.flatten(0, 1)[read_m]

    def head(self, e_md: Tensor) -> Head:
        return Head(e_md, None)

    def project(self, e_md: Tensor) -> Tensor:
        return e_md

    def conditioning(self, e_bnd: Tensor | None) -> Tensor | None:
        return None

    def criticize(self, ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        raise NotImplementedError

    def eval(self) -> Oracle:
        return self


def pairs_oracle(symbols: int) -> Oracle:
    """Exact conditionals of the pairs source: a visible twin tells all, otherwise nothing is known."""

    def log_probabilities(ids: Tensor, masked: Tensor) -> Tensor:
        b, n = ids.shape
        twin = torch.arange(n) ^ 1
        uniform = torch.full((b, n, symbols + 1), 1 / symbols, dtype=torch.float64)
        known = torch.nn.functional.one_hot(ids[:, twin], symbols + 1).double()
        return torch.where(masked[:, twin, None], uniform, known).clamp(min=1e-300).log()

    return Oracle(symbols, log_probabilities)


def flip_chain_oracle(flip: float = 0.1) -> Oracle:
    """Exact conditionals of the flip chain: the nearest visible neighbours on both sides.

    Over distance d a symbol stays with probability s(d) = (1 + (1 - 2 flip)^d) / 2.
    """
    keep = 1 - 2 * flip

    def log_probabilities(ids: Tensor, masked: Tensor) -> Tensor:
        b, n = ids.shape
        out = torch.zeros(b, n, 3, dtype=torch.float64)
        for row in range(b):
            visible = [i for i in range(n) if not masked[row, i]]
            for i in range(n):
                weight = [1.0, 1.0]
                for side in (
                    max((j for j in visible if j < i), default=None),
                    min((j for j in visible if j > i), default=None),
                ):
                    if side is not None:
                        stay = (1 + keep ** abs(side - i)) / 2
                        value = int(ids[row, side])
                        weight[value] *= stay
                        weight[1 - value] *= 1 - stay
                total = sum(weight)
                out[row, i, 0], out[row, i, 1] = weight[0] / total, weight[1] / total
        return out.clamp(min=1e-300).log()

    return Oracle(2, log_probabilities)
