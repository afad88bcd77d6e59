"""The losses of a masked batch: cross-entropy at masked positions, and the critic's.

Letters: b rows, n positions, v vocabulary, m packed masked positions, p packed maskable positions.
Nothing here knows a model class: `Model` says what is needed of one. Embeddings and the vocabulary
projection are computed at masked positions only, the projection a chunk at a time: neither a [b, n, v]
tensor exists nor a [m, v] one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import cross_entropy, draws, schedule
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary, coin
from maskwire_server.training.draws import Purpose

_SAMPLE_CHUNK = 2**21  # fp64 probabilities held at once while sampling: 16 MiB


class Model(Protocol):
    """A generator, and perhaps a critic."""

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """Embeddings, [b, n, d], or [m, d] at the positions `read_m`; `cond` as in `conditioning`.

        Positions are counted through the rows, each at most once.
        """

    def head(self, e_md: Tensor) -> tuple[Tensor, Tensor]:
        """x [m, d] and w [v, d] of packed positions' logits x w^T."""

    def project(self, e_md: Tensor) -> Tensor:
        """Logits of packed positions, [m, v]."""

    def conditioning(self, e_bnd: Tensor | None) -> Tensor | None:
        """What the generator is conditioned on: a first pass, the null embedding for None, or nothing."""

    def criticize(self, ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        """The critic's logits, [b, n]; without `train_trunk` a self critic's trunk gets no gradient."""


@dataclass(frozen=True)
class StepPlan:
    """What a step computes, and who learns from it."""

    generator_learns: bool = True
    critic: bool = False
    """Compute the critic's loss."""
    first_pass: bool = False
    """Condition on a first pass."""
    temperature: float = 1.0
    """Of the critic's samples; 0 takes the most probable id."""


@dataclass(frozen=True)
class PartLosses:
    """A part's share of the logical batch's losses, fp64 scalars with gradients."""

    generator: Tensor
    critic: Tensor | None


def position_weights(
    config: ObjectiveConfig, n_b: Tensor, k_b: Tensor, masking: schedule.Schedule | None = None
) -> Tensor:
    """What each masked position's cross-entropy counts for, fp64 [b], over the whole logical batch.

    elbo: w_b / sum n_b, so that the sum estimates nats per maskable token. masked_mean: 1 / sum k_b.
    """
    if config.weighting == "masked_mean":
        return torch.full_like(n_b, 1, dtype=torch.float64) / k_b.sum().clamp(min=1)
    chosen = masking or schedule.SCHEDULES[config.schedule]
    return schedule.elbo_weights(chosen, config.masking, k_b, n_b) / n_b.sum().clamp(min=1)


def logits_in_chunks(model: Model, e_md: Tensor, vocabulary: Vocabulary) -> Iterator[tuple[slice, Tensor]]:
    """Some positions and their logits, [chunk, v], at a time: of all at once only generation has room."""
    for some in cross_entropy.chunks(e_md.shape[0], vocabulary.num_tokens, e_md.device):
        yield some, cross_entropy.forbid_special(model.project(e_md[some]), vocabulary)


def plan_step(config: ObjectiveConfig, step: StepKey, *, has_critic: bool, train_generator: bool,
               train_critic: bool, temperature: float | None) -> StepPlan:  # fmt: skip
    """What a training step computes, its coins and its temperature drawn."""
    at = (step.seed, step.lineage, step.number)
    if temperature is None:
        temperature = draws.uniform_scalar(Purpose.TEMPERATURE, *at)
    return StepPlan(
        generator_learns=train_generator,
        critic=has_critic and train_critic,
        first_pass=config.self_cond and coin(step, 2, config.self_cond_prob),
        temperature=temperature,
    )


def embeddings(
    model: Model,
    config: ObjectiveConfig,
    input_bn: Tensor,
    valid_bn: Tensor | None,
    read_m: Tensor,
    *,
    first_pass: bool,
) -> Tensor:
    """The generator's embeddings of what it sees, [m, d] at `read_m`, after a first pass if there is one.

    `valid_bn` is None when nothing is padded.
    """
    first = None
    if first_pass:
        with torch.no_grad():
            start = model.conditioning(None) if config.self_cond_start == "null" else None
            first = model.embed(input_bn, valid_bn, start)
    cond = model.conditioning(first) if config.self_cond else None
    return model.embed(input_bn, valid_bn, cond, read_m)


def positions(mask_bn: Tensor) -> Tensor:
    """The positions of a mask, counted through the rows, int64 [m]."""
    return mask_bn.flatten().nonzero()[:, 0]


def losses(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    part: Corruption,
    weight_b: Tensor,
    maskable: int,
    modes: StepPlan,
    sample_keys_b: Tensor,
) -> PartLosses:
    """One part's share of the losses of its logical batch.

    `weight_b` are the part's `position_weights`, `maskable` the logical batch's number of maskable
    positions, which the critic's mean runs over.
    """
    valid = None if bool(part.valid_bn.all()) else part.valid_bn
    masked_m = positions(part.mask_bn)
    n = part.ids_bn.shape[1]
    sampled_m = torch.zeros_like(masked_m)
    look: cross_entropy.Look | None = None
    if modes.critic:
        u_m = draws.uniform(sample_keys_b, n).flatten()[masked_m]

        def look(rows: slice, logits: Tensor) -> None:
            sampled_m[rows] = sample(logits, u_m[rows], modes.temperature)

    with torch.set_grad_enabled(modes.generator_learns and torch.is_grad_enabled()):
        e_md = embeddings(model, config, part.input_bn, valid, masked_m, first_pass=modes.first_pass)
        target_m, weight_m = part.ids_bn.flatten()[masked_m], weight_b[masked_m // n]
        generator = cross_entropy.weighted_sum(*model.head(e_md), target_m, weight_m, vocabulary, look)
    if not modes.critic:
        return PartLosses(generator, None)
    filled_bn = part.ids_bn.masked_scatter(part.mask_bn, sampled_m)
    bce_p = critic_cross_entropy(model, config, part, filled_bn, valid, modes.generator_learns)
    return PartLosses(generator, bce_p.double().sum() / maskable)


def minimized(sums: PartLosses, config: ObjectiveConfig, modes: StepPlan, numerics_version: int) -> Tensor:
    """What a part adds to the step's `loss`, the number that is reported and the one whose gradient is taken.

    The critic's weight balances it against the generator's loss: a critic that trains alone minimises its
    plain loss. Numerics version 1 minimised the weighted one; its steps are computed again as they were.
    """
    if sums.critic is None:
        return sums.generator
    if not modes.generator_learns:
        return sums.critic if numerics_version > 1 else config.critic_loss_weight * sums.critic
    return sums.generator + config.critic_loss_weight * sums.critic


def critic_cross_entropy(
    model: Model,
    config: ObjectiveConfig,
    part: Corruption,
    filled_bn: Tensor,
    valid: Tensor | None,
    train_trunk: bool,
) -> Tensor:
    """The critic's binary cross-entropy at each maskable position, fp32 [p]."""
    scores_bn = model.criticize(filled_bn, valid, train_trunk=train_trunk)
    labels_bn = critic_labels(config, part, filled_bn)
    scores_p = scores_bn[part.maskable_bn].float()
    return F.binary_cross_entropy_with_logits(
        scores_p, labels_bn[part.maskable_bn].to(scores_p.dtype), reduction="none"
    )


def critic_labels(config: ObjectiveConfig, part: Corruption, filled_bn: Tensor) -> Tensor:
    """What the critic must find, bool [b, n]: ids that are wrong, or (Lezama et al. 2022) were masked."""
    return part.mask_bn if config.critic_labels == "token_critic" else filled_bn != part.ids_bn


def sample(logits_mv: Tensor, u_m: Tensor, temperature: float | Tensor) -> Tensor:
    """An id for each row of logits, int64 [m]: softmax(logits / temperature) by its inverse CDF.

    The same distribution as an argmax over logits / temperature + Gumbel noise, with one fp64 uniform
    number a position; computed in fp64 a chunk at a time. Temperature 0 (or a fp64 [m] tensor with
    zeros) takes the most probable id.
    """
    m, v = logits_mv.shape
    temperature_m = torch.as_tensor(temperature, dtype=torch.float64, device=logits_mv.device).expand(m)
    greedy_m = logits_mv.argmax(-1)
    sampled = []
    chunk = max(1, _SAMPLE_CHUNK // v)
    for rows in (slice(start, start + chunk) for start in range(0, m, chunk)):
        logits = logits_mv[rows].double()
        # The largest logit goes to 0 before the division, so that a tiny temperature cannot overflow.
        logits = logits - logits.amax(-1, keepdim=True)
        cdf = (logits / temperature_m[rows, None].clamp(min=1e-300)).exp().cumsum(-1)
        target = u_m[rows, None] * cdf[:, -1:]
        # right=True skips ids of probability 0 in front, also when u is 0.
        sampled.append(torch.searchsorted(cdf, target, right=True)[:, 0])
    if not sampled:
        return greedy_m
    sampled_m = torch.cat(sampled)
    # Rounding can put u times the total on the total itself: then the last id that is possible.
    sampled_m = torch.where(sampled_m >= v, greedy_m, sampled_m)
    return torch.where(temperature_m == 0, greedy_m, sampled_m)
