"""Evaluation: a low-variance estimate of the negative ELBO, and the configured losses.

Each row has draws in two halves of K. Systematic sampling gives the counts of masked positions of each half:
k_j = floor(n (j + u)/K) + 1 for j = 0 ... K-1, with one uniform u per half. On average over u, the points
(j + u)/K fall equally often into each of the n intervals [(k-1)/n, k/n), so that each count is equally
likely, for every n and K. With k uniform on 1 to n,

    negative ELBO of a row = sum over k of (1/k) E[CE sum at k masked] = E[(n/k) CE sum].

The difference of the two halves gives the Monte Carlo error.

Letters: r rows, d draws, b pseudo-rows (a row with one of its draws), n positions, m masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwire.v1.values import LossSums
from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import Unwanted
from maskwire_server.results import EvalOptions, EvalResult
from maskwire_server.training import draws, masking_schedule, objective
from maskwire_server.training.corruption import Corruption, Vocabulary, mask_exactly
from maskwire_server.training.draws import Purpose
from maskwire_server.training.evaluation_figures import Bins, combine, halves, summarize
from maskwire_server.training.micro_batch_split import split_by_length
from maskwire_server.training.objective import Model
from maskwire_server.training.tensor_batch import TensorBatch


@dataclass(frozen=True)
class DrawSums:
    """Sums over positions, for each draw of each row: fp64 tensors of shape [r, d]."""

    ce: Tensor
    """Cross-entropy over masked positions, in nats."""
    correct: Tensor
    """Number of masked positions where the most probable id is right."""
    bce: Tensor
    """The critic's binary cross-entropy over maskable positions."""
    critic_correct: Tensor
    """Number of maskable positions where the sign of the critic's logit is right."""


def systematic_counts(n_r: Tensor, u_r: Tensor, count: int) -> Tensor:
    """Compute `count` numbers of masked positions for each row, by systematic sampling with offset u.

    They are k_j = floor(n (j + u)/K) + 1, or 0 where n = 0, with K = `count`: int64, of shape [r, K].
    """
    j_d = torch.arange(count, dtype=torch.float64)
    k_rd = torch.floor(n_r[:, None] * (j_d + u_r[:, None]) / count).to(torch.int64) + 1
    return torch.minimum(k_rd, n_r[:, None])  # rounding can reach n + 1


def draw_counts(n_r: Tensor, row_ids: list[int], seed: int, count: int) -> Tensor:
    """The number of masked positions of each draw of each row, as an int64 tensor of shape [r, d].

    The draws depend only on the seed and the ids of the rows.
    """
    first, second = halves(count)
    offset = draws.uniform(draws.keys(Purpose.EVALUATION_OFFSET, seed, rows=row_ids), 1)[:, 0]
    again = draws.uniform(draws.keys(Purpose.EVALUATION_SECOND_OFFSET, seed, rows=row_ids), 1)[:, 0]
    parts = [systematic_counts(n_r, offset, first)]
    if second:
        parts.append(systematic_counts(n_r, again, second))
    return torch.cat(parts, dim=1)


def evaluate(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    batch: TensorBatch,
    options: EvalOptions,
    *,
    budget: int,
    smallest: int,
    device: torch.device,
    has_critic: bool,
    ema_weights: bool,
    wanted: Callable[[], bool] = lambda: True,
) -> EvalResult:
    """Evaluate a batch in parts of at most `budget` positions. Call it without gradients.

    `smallest` is the number of positions from which a part may end early; see `split_by_length`. `wanted` is
    called before each part. If it returns False, Unwanted is raised.
    """
    n_r = batch.maskable_s
    k_rd = draw_counts(n_r, list(options.row_ids), options.seed, options.draws)
    critic = has_critic and not options.only_train_generator
    flat = torch.zeros(4, k_rd.numel(), dtype=torch.float64)
    for where, part, keys_b, temperature_b in _parts(
        batch, k_rd, options, vocabulary, budget, smallest, critic
    ):
        if not wanted():
            raise Unwanted("the evaluation was cancelled: its client no longer waits for it")
        flat[:, where] = _part_sums(
            model, config, vocabulary, part.to(device), keys_b, temperature_b, critic
        ).cpu()
    sums = DrawSums(*flat.view(4, *k_rd.shape))
    return figures(sums, config, n_r, k_rd, options, has_critic=critic, ema_weights=ema_weights)


def _parts(
    batch: TensorBatch,
    k_rd: Tensor,
    options: EvalOptions,
    vocabulary: Vocabulary,
    budget: int,
    smallest: int,
    critic: bool,
) -> Iterator[tuple[list[int], Corruption, Tensor, Tensor]]:
    """Yield the pseudo-rows in parts, with the keys and temperatures for sampling the critic's inputs."""
    d = k_rd.shape[1]
    length_b = [length for length in batch.lengths for _ in range(d)]
    for where, longest in split_by_length(length_b, range(len(length_b)), budget, smallest):
        who = [(options.row_ids[b // d], b % d) for b in where]

        def keys(purpose: Purpose, who: list[tuple[int, int]] = who) -> Tensor:
            return torch.tensor([draws.key(purpose, options.seed, row, draw) for row, draw in who])

        ids_bn, valid_bn, maskable_bn = batch.take([b // d for b in where], longest)
        k_b = k_rd.flatten()[where]
        mask_bn = mask_exactly(keys(Purpose.MASK), maskable_bn, k_b)
        part = Corruption(
            ids_bn,
            valid_bn,
            maskable_bn,
            mask_bn,
            torch.where(mask_bn, vocabulary.mask_id, ids_bn),
            maskable_bn.sum(-1),
            k_b,
        )
        sample_b, temperature_b = torch.zeros(len(who), dtype=torch.int64), torch.zeros(len(who)).double()
        if critic:
            sample_b = keys(Purpose.CRITIC_SAMPLE)
        if critic and options.generator_sample_temperature is None:
            temperature_b = draws.uniform(keys(Purpose.TEMPERATURE), 1)[:, 0]
        elif options.generator_sample_temperature is not None:
            temperature_b = torch.full((len(who),), options.generator_sample_temperature).double()
        yield where, part, sample_b, temperature_b


def _part_sums(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    part: Corruption,
    keys_b: Tensor,
    temperature_b: Tensor,
    critic: bool,
) -> Tensor:
    """Compute the four sums in `DrawSums` for each pseudo-row, as an fp64 tensor of shape [4, b]."""
    device = part.ids_bn.device
    valid = None if bool(part.valid_bn.all()) else part.valid_bn
    b, n = part.ids_bn.shape
    masked_m = objective.positions(part.mask_bn)
    row_m, target_m = masked_m // n, part.ids_bn.flatten()[masked_m]
    u_m = draws.uniform(keys_b.to(device), n).flatten()[masked_m] if critic else None
    temperature_m = temperature_b.to(device)[row_m]
    e_md = objective.embeddings(model, config, part.input_bn, valid, masked_m, first_pass=config.self_cond)
    sums = torch.zeros(4, b, dtype=torch.float64, device=device)
    sampled_m = torch.zeros_like(target_m)
    for some, logits in objective.logits_in_chunks(model, e_md, vocabulary):
        target = target_m[some]
        sums[0].index_add_(0, row_m[some], F.cross_entropy(logits, target, reduction="none").double())
        sums[1].index_add_(0, row_m[some], (logits.argmax(-1) == target).double())
        if u_m is not None:
            sampled_m[some] = objective.sample(logits, u_m[some], temperature_m[some])
    if critic:
        filled_bn = part.ids_bn.masked_scatter(part.mask_bn, sampled_m)
        scores_bn = model.criticize(filled_bn, valid, train_trunk=False)
        scores_bn = scores_bn if scores_bn.dtype == torch.float64 else scores_bn.float()
        labels_bn = objective.critic_labels(config, part, filled_bn)
        bce_bn = F.binary_cross_entropy_with_logits(
            scores_bn, labels_bn.to(scores_bn.dtype), reduction="none"
        )
        sums[2] = bce_bn.double().masked_fill(~part.maskable_bn, 0).sum(-1)
        sums[3] = (((scores_bn > 0) == labels_bn) & part.maskable_bn).sum(-1)
    return sums


def figures(
    sums: DrawSums,
    config: ObjectiveConfig,
    n_r: Tensor,
    k_rd: Tensor,
    options: EvalOptions,
    *,
    has_critic: bool,
    ema_weights: bool,
) -> EvalResult:
    """Compute the results of an evaluation from the sums of its draws."""
    n = n_r.double()
    nats_rd = torch.where(k_rd > 0, n[:, None] / k_rd.clamp(min=1) * sums.ce, 0.0)
    nats, weight = float(nats_rd.mean(1).sum()), float(n.sum())
    masked_mean = config.weighting == "masked_mean"
    # A count k has probability 1/n in the evaluation and P(k) in training.
    ratio_rd = _importance(config, n_r, k_rd) if masked_mean or has_critic else torch.ones_like(nats_rd)
    if masked_mean:
        nats, weight = float((ratio_rd * sums.ce).sum()), float((ratio_rd * k_rd).sum())
    found = LossSums(nats, weight)
    critic = critic_accuracy = None
    if has_critic:
        of_critic = float((ratio_rd * sums.bce).sum()), float((ratio_rd * n[:, None]).sum())
        found = LossSums(nats, weight, *of_critic, config.critic_loss_weight)
        critic = of_critic[0] / of_critic[1]
        critic_accuracy = float(sums.critic_correct.sum()) / (int(n_r.sum()) * k_rd.shape[1])
    return summarize(
        nats_rd,
        n_r,
        Bins.collect(k_rd, n_r[:, None].expand_as(k_rd), k_rd, sums.ce, sums.correct),
        found,
        combine(nats / weight, critic, config.critic_loss_weight, options.only_train_critic),
        options,
        critic_accuracy=critic_accuracy,
        ema_weights=ema_weights,
    )


def _importance(config: ObjectiveConfig, n_r: Tensor, k_rd: Tensor) -> Tensor:
    """The probability P(k) of each count in training over 1/n in evaluation: n P(k), or 0 where n = 0."""
    n_rd = n_r[:, None].expand_as(k_rd)
    probabilities = (
        masking_schedule.exact_probabilities
        if config.masking == "exact"
        else masking_schedule.bernoulli_probabilities
    )
    p_rd = probabilities(
        masking_schedule.named(config.schedule),
        k_rd.flatten().clamp(min=1),
        n_rd.flatten().clamp(min=1),
    ).view_as(k_rd)
    return torch.where(n_rd > 0, n_rd * p_rd, 0.0)
