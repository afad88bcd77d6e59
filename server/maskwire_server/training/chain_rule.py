"""The chain rule: the exact log-likelihood of a row in one order of its positions, one pass per position.

    log p(x) = sum over i of log p(x_o(i) | x_o(1) ... x_o(i-1))      o: an order of the maskable positions

In pass i the prompt and the i - 1 positions before o(i) are visible. The other n - i + 1 positions are
masked, and o(i) is predicted. The order is fixed or random, but never depends on the tokens, so this is the
likelihood of a real sampling procedure. Two orders give the same likelihood only if the model's conditionals
are those of one joint distribution. Over uniformly random orders, the masked set of size k is uniformly
random, and o(i) is uniform in it, so the mean of -log p(x) is sum over k of (1/k) E[CE sum at k masked]. This
is the negative ELBO.

Letters: r rows, d draws (orders), b pseudo-rows (a row with one of its passes), n positions, v vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwire.v1.values import LossSums
from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import Unwanted
from maskwire_server.results import EvalOptions, EvalResult
from maskwire_server.training import draws, objective
from maskwire_server.training.corruption import Corruption, Vocabulary, random_ranks
from maskwire_server.training.draws import Purpose
from maskwire_server.training.evaluation_figures import Bins, combine, summarize
from maskwire_server.training.micro_batch_split import split
from maskwire_server.training.objective import Model
from maskwire_server.training.tensor_batch import TensorBatch


@dataclass(frozen=True)
class PassBatch:
    """Pseudo-rows (a row with one of its passes each) that are computed together."""

    part: Corruption
    target_b: Tensor
    """int64: the predicted position."""
    where_b: Tensor
    """int64: the index row * draws + draw."""


def evaluate(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    batch: TensorBatch,
    options: EvalOptions,
    *,
    budget: int,
    device: torch.device,
    ema_weights: bool,
    wanted: Callable[[], bool] = lambda: True,
) -> EvalResult:
    """Evaluate a batch by the chain rule, in parts of at most `budget` positions. Call it without gradients.

    Each draw is one order. Logits are computed only at the predicted positions. `wanted` is called before
    each part. If it returns False, Unwanted is raised.
    """
    n_r = batch.maskable_s
    nats = torch.zeros(n_r.numel() * options.draws, dtype=torch.float64)
    k_parts, n_parts, ce_parts, right_parts = [], [], [], []
    for chunk in passes(batch, options, vocabulary, budget):
        if not wanted():
            raise Unwanted("the evaluation was cancelled: its client no longer waits for it")
        ce_b, correct_b = _predict(model, config, vocabulary, chunk.part.to(device), chunk.target_b)
        nats.index_add_(0, chunk.where_b, ce_b)
        k_parts.append(chunk.part.k_b)
        n_parts.append(chunk.part.n_b)
        ce_parts.append(ce_b)
        right_parts.append(correct_b)
    k_p, n_p, ce_p, right_p = (torch.cat(parts) for parts in (k_parts, n_parts, ce_parts, right_parts))
    nats_rd = nats.view(n_r.numel(), options.draws)
    total, tokens = float(nats_rd.mean(1).sum()), float(n_r.sum())
    return summarize(
        nats_rd,
        n_r,
        Bins.collect(k_p, n_p, torch.ones_like(k_p), ce_p, right_p),
        LossSums(total, tokens),
        combine(total / tokens, None, config.critic_loss_weight, only_critic=False),
        options,
        critic_accuracy=None,
        ema_weights=ema_weights,
    )


def ranks(maskable_bn: Tensor, options: EvalOptions, row_b: Tensor, draw_b: Tensor) -> Tensor:
    """The rank of each position in the order of its row, as an int64 tensor of shape [b, n].

    The first position of an order has rank 0. Positions that are not in the order have rank n.

    A random order depends on the seed, the id of the row and the draw. It covers the maskable positions, so
    that padding, prompts and other rows do not change it.
    """
    if not options.random_order:
        rank_bn = maskable_bn.cumsum(-1) - 1
    else:
        whose = zip(row_b.tolist(), draw_b.tolist(), strict=True)
        keys = [draws.key(Purpose.CHAIN_ORDER, options.seed, options.row_ids[r], d) for r, d in whose]
        rank_bn = random_ranks(torch.tensor(keys), maskable_bn)
    return rank_bn.masked_fill(~maskable_bn, maskable_bn.shape[1])


def passes(
    batch: TensorBatch, options: EvalOptions, vocabulary: Vocabulary, budget: int
) -> Iterator[PassBatch]:
    """Yield all passes of all orders of all rows, in parts of at most `budget` positions."""
    n_r, length_r = batch.maskable_s.tolist(), batch.lengths
    each = ((r, d, i) for r, n in enumerate(n_r) for d in range(options.draws) for i in range(n))
    length_b = (length_r[r] for r, n in enumerate(n_r) for _ in range(options.draws * n))
    for where, longest in split(length_b, budget):
        chosen = list(itertools.islice(each, len(where)))
        yield _together(batch, options, vocabulary, chosen, longest)


def _together(
    batch: TensorBatch,
    options: EvalOptions,
    vocabulary: Vocabulary,
    chosen: list[tuple[int, int, int]],
    longest: int,
) -> PassBatch:
    row_b, draw_b, pass_b = torch.tensor(chosen).unbind(1)
    orders, of_b = torch.unique(torch.stack((row_b, draw_b)), dim=1, return_inverse=True)
    _, _, of_orders = batch.take(orders[0].tolist(), longest)
    rank_bn = ranks(of_orders, options, *orders)[of_b]
    ids_bn, valid_bn, maskable_bn = batch.take(row_b.tolist(), longest)
    mask_bn = maskable_bn & (rank_bn >= pass_b[:, None])
    part = Corruption(
        ids_bn,
        valid_bn,
        maskable_bn,
        mask_bn,
        torch.where(mask_bn, vocabulary.mask_id, ids_bn),
        maskable_bn.sum(-1),
        mask_bn.sum(-1),
    )
    target_b = (rank_bn == pass_b[:, None]).long().argmax(-1)
    return PassBatch(part, target_b, row_b * options.draws + draw_b)


def _predict(
    model: Model, config: ObjectiveConfig, vocabulary: Vocabulary, part: Corruption, target_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each pass, and 1 or 0 for whether the most probable id is right.

    Both are fp64 tensors of shape [b] on the CPU. `target_b` is the position that each pass predicts.
    """
    valid = None if bool(part.valid_bn.all()) else part.valid_bn
    b, n = part.ids_bn.shape
    at_b = torch.arange(0, b * n, n, device=part.ids_bn.device) + target_b.to(part.ids_bn.device)
    e_bd = objective.embeddings(model, config, part.input_bn, valid, at_b, first_pass=config.self_cond)
    ids_b = part.ids_bn.flatten()[at_b]
    ce_b, right_b = torch.zeros(2, b, dtype=torch.float64)
    for some, logits in objective.logits_in_chunks(model, e_bd, vocabulary):
        ce_b[some] = F.cross_entropy(logits, ids_b[some], reduction="none").double().cpu()
        right_b[some] = (logits.argmax(-1) == ids_b[some]).double().cpu()
    return ce_b, right_b
