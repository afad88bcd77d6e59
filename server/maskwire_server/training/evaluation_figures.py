"""Computes the results of an evaluation from the sums over its passes, in fp64.

Letters: r rows, d draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwire.v1.values import FractionResult, Losses, LossSums, RowResult
from maskwire_server.errors import Diverged
from maskwire_server.results import EvalOptions, EvalResult

BINS = 10


@dataclass(frozen=True)
class Bins:
    """Sums over predicted positions by the masked fraction of their row: fp64, of shape [BINS] each."""

    predicted: Tensor
    ce: Tensor
    """The cross-entropy of the predicted positions, in nats."""
    correct: Tensor
    """The number of predicted positions whose most probable id is right."""

    @staticmethod
    def collect(k: Tensor, n: Tensor, predicted: Tensor, ce: Tensor, correct: Tensor) -> Bins:
        """Sum the passes with k > 0 of n positions masked, by k/n. All arguments have the same shape."""
        # ceil(10 k/n) - 1, computed in integers, so that rounding does not move k/n = 0.3 into (0.3, 0.4].
        index = ((k * BINS + n - 1) // n.clamp(min=1) - 1).clamp(min=0).flatten()
        here = (k > 0).flatten()

        def added(values: Tensor) -> Tensor:
            found = torch.zeros(BINS, dtype=torch.float64)
            return found.index_add_(0, index[here], values.flatten()[here].double())

        return Bins(added(predicted), added(ce), added(correct))

    def results(self) -> tuple[FractionResult, ...]:
        """The result of each interval of masked fractions, in ascending order."""
        found = []
        columns = zip(self.predicted.tolist(), self.ce.tolist(), self.correct.tolist(), strict=True)
        for index, (predicted, ce, correct) in enumerate(columns):
            found.append(
                FractionResult(
                    index / BINS,
                    (index + 1) / BINS,
                    ce / predicted if predicted else None,
                    correct / predicted if predicted else None,
                    int(predicted),
                )
            )
        return tuple(found)


def halves(count: int) -> tuple[int, int]:
    """Divide a number of draws into two halves. A single draw has no second half."""
    return count - count // 2, count // 2


def summarize(
    nats_rd: Tensor,
    n_r: Tensor,
    bins: Bins,
    sums: LossSums,
    losses: Losses,
    options: EvalOptions,
    *,
    critic_accuracy: float | None,
    ema_weights: bool,
) -> EvalResult:
    """Assemble the results of an evaluation.

    `nats_rd` is the estimate of each row's nats by each draw, fp64 of shape [r, d]. `n_r` is the number of
    maskable positions of each row. Raises Diverged if the losses are not finite.
    """
    if not (bool(nats_rd.isfinite().all()) and math.isfinite(losses.loss)):
        raise Diverged("the weights have diverged: the losses are not finite")
    n = n_r.double()
    tokens = int(n_r.sum())
    nats_r = nats_rd.mean(1)
    per_token = float(nats_r.sum()) / tokens
    difference_r = half_differences(nats_rd)
    apart = [None] * len(options.row_ids) if difference_r is None else difference_r.tolist()
    rows = zip(options.row_ids, nats_r.tolist(), n_r.tolist(), apart, strict=True)
    return EvalResult(
        losses=losses,
        nats_per_token=per_token,
        bits_per_token=per_token / math.log(2),
        perplexity=math.exp(min(per_token, 700.0)),
        standard_error=standard_error(nats_r, n, per_token),
        monte_carlo_error=(
            None if difference_r is None else float(difference_r.square().sum().sqrt()) / (2 * tokens)
        ),
        accuracy=float(bins.correct.sum() / bins.predicted.sum()),
        critic_accuracy=critic_accuracy,
        tokens=tokens,
        ema_weights=ema_weights,
        draws=options.draws,
        bits_per_byte=(
            float(nats_r.sum()) / math.log(2) / options.text_bytes if options.text_bytes else None
        ),
        by_masked_fraction=bins.results(),
        rows=tuple(RowResult(*row) for row in rows),
        sums=sums,
    )


def combine(generator: float, critic: float | None, weight: float, only_critic: bool) -> Losses:
    """Combine the losses of generator and critic for the client. A loss that was not computed is None."""
    if critic is None:
        return Losses(generator, generator)
    if only_critic:
        return Losses(critic, None, critic)
    return Losses(generator + weight * critic, generator, critic)


def standard_error(nats_r: Tensor, n_r: Tensor, per_token: float) -> float | None:
    """The standard error of the nats per token, sum L / sum n over rows (Cochran 1977, 6.4).

    L is the nats and n the number of maskable positions of a row. None if fewer than two rows have maskable
    positions. To first order, the estimate r and the true ratio R differ by r - R = sum (L - R n) / sum n, a
    sum of independent terms with mean 0. Their variance is estimated with r instead of R, which the factor
    rows/(rows - 1) corrects.
    """
    rows = int((n_r > 0).sum())
    if rows < 2:
        return None
    residual = (nats_r - per_token * n_r).square().sum()
    return float((rows / (rows - 1) * residual).sqrt() / n_r.sum())


def half_differences(nats_rd: Tensor) -> Tensor | None:
    """The mean of the first half of the draws minus the mean of the second half; None for a single draw.

    An fp64 tensor of shape [r]. It is scaled by 2 sqrt(ab)/K for halves of a and b of K draws (1 if they are
    equal), so that a quarter of its square estimates the variance of the mean over all draws. If s² is the
    variance of a draw, the mean has the variance s²/K, and the difference has s²(1/a + 1/b) = s² K/(ab).
    """
    first, second = halves(nats_rd.shape[1])
    if not second:
        return None
    scale = 2 * math.sqrt(first * second) / (first + second)
    return scale * (nats_rd[:, :first].mean(1) - nats_rd[:, first:].mean(1))
