"""The losses of a masked batch: the cross-entropy at masked positions, and the critic's loss.

Letters: b rows, n positions, v vocabulary, m masked positions, p maskable positions.
This module depends on no model class. `Model` is the interface that it needs. Embeddings and the vocabulary
projection are computed at masked positions only, the projection in chunks, so that there is no tensor of
shape [b, n, v] or [m, v].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import cross_entropy, draws, masking_schedule
from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary, coin
from maskwire_server.training.device_copies import upload
from maskwire_server.training.draws import Purpose
from maskwire_server.training.head import Head

_SAMPLE_CHUNK = {"cpu": 2**21, "cuda": 2**24}  # fp64 probabilities at once: 16 and 128 MiB


class Model(Protocol):
    """The interface of a generator and an optional critic that the losses need."""

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning, read_m: Tensor | None = None
    ) -> Tensor:
        """Return the generator's embeddings of the ids, [b, n, d], or only those at `read_m`, [m, d].

        `cond` is a result of `conditioning`. `read_m` holds indices into the flattened [b, n] grid, each at
        most once.
        """

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the output layer for the embeddings of m positions."""

    def project(self, e_md: Tensor) -> Tensor:
        """Return the logits, [m, v], for the embeddings of m positions."""

    def conditioning(self, e_bnd: Tensor | None) -> Conditioning:
        """Return the conditioning of a pass, with the embeddings of a first pass, or without them (None).

        Returns None if the generator has no self-conditioning.
        """

    def criticize(self, ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        """Return the critic's logits, [b, n]. A self critic trains the generator only with `train_trunk`."""


@dataclass(frozen=True)
class StepPlan:
    """What a training step computes, and which networks it trains."""

    generator_learns: bool = True
    """Train the generator."""
    critic: bool = False
    """Compute the critic's loss, and train the critic."""
    first_pass: bool = False
    """Condition the generator on a first pass."""
    temperature: float = 1.0
    """Temperature of the samples for the critic. 0 takes the most probable id."""


@dataclass(frozen=True)
class TrainingPart:
    """A micro-batch on the device: all that its losses depend on, apart from the weights."""

    rows: Corruption
    valid_bn: Tensor | None
    """The valid positions, bool [b, n]; None if there is no padding."""
    masked_m: Tensor
    """int64: the masked positions, as indices into the flattened [b, n] grid."""
    target_m: Tensor
    """int64: the ids at the masked positions."""
    weight_m: Tensor
    """fp64: the weights of the cross-entropy at the masked positions."""
    u_m: Tensor | None
    """fp64: the uniform numbers that choose the ids for the critic to judge; None without a critic."""
    maskable_p: Tensor | None
    """int64: the maskable positions, which the critic judges, as indices; None without a critic."""

    @staticmethod
    def of(rows: Corruption, weight_b: Tensor, critic_keys_b: Tensor | None, *, padded: bool) -> TrainingPart:
        """Find the positions, without waiting for the device if the counts of `rows` are in host memory.

        `weight_b` holds the `position_weights` of the rows. `critic_keys_b` are the keys of the random draws
        for the critic's input, or None without a critic. `padded` says whether any position is padding.
        """
        n, device = rows.ids_bn.shape[1], rows.ids_bn.device
        masked_m = positions(rows.mask_bn, int(rows.k_b.sum()))
        u_m = maskable_p = None
        if critic_keys_b is not None:
            u_m = draws.uniform(upload(critic_keys_b, device), n).flatten()[masked_m]
            maskable_p = positions(rows.maskable_bn, int(rows.n_b.sum()))
        return TrainingPart(
            rows=rows,
            valid_bn=rows.valid_bn if padded else None,
            masked_m=masked_m,
            target_m=rows.ids_bn.flatten()[masked_m],
            weight_m=upload(weight_b, device)[masked_m // n],
            u_m=u_m,
            maskable_p=maskable_p,
        )


@dataclass(frozen=True)
class PartLosses:
    """What a micro-batch adds to the losses of the logical batch: fp64 scalars with gradients."""

    generator: Tensor
    critic: Tensor | None


def position_weights(
    config: ObjectiveConfig, n_b: Tensor, k_b: Tensor, masking: masking_schedule.Schedule | None = None
) -> Tensor:
    """The weight of the cross-entropy at each masked position of a row, fp64 [b].

    Row b has n_b maskable positions, of which k_b are masked. With the weighting "elbo", its weight is
    w_b / sum n_b, where w_b comes from `elbo_weights`: the weighted sum then estimates nats per maskable
    token. With "masked_mean", the weight is 1 / sum k_b. The sums are over the whole logical batch.
    """
    if config.weighting == "masked_mean":
        return torch.full_like(n_b, 1, dtype=torch.float64) / k_b.sum().clamp(min=1)
    chosen = masking or masking_schedule.named(config.schedule)
    return masking_schedule.elbo_weights(chosen, config.masking, k_b, n_b) / n_b.sum().clamp(min=1)


def logits_in_chunks(model: Model, e_md: Tensor, vocabulary: Vocabulary) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of positions, as slices, with their logits, [chunk, v]."""
    for some in cross_entropy.chunks(e_md.shape[0], vocabulary.num_tokens, e_md.device):
        yield some, cross_entropy.forbid_special(model.project(e_md[some]), vocabulary)


def plan_step(config: ObjectiveConfig, step: StepKey, *, has_critic: bool, train_generator: bool,
               train_critic: bool, temperature: float | None) -> StepPlan:  # fmt: skip
    """Plan a training step. Draw whether it has a first pass, and the temperature if none is given."""
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
    """Return the generator's embeddings at the positions `read_m`, [m, d].

    With `first_pass`, they are conditioned on the embeddings of a first pass, which has no gradients.
    `valid_bn` is None if there is no padding.
    """
    first = None
    if first_pass:
        with torch.no_grad(), _autocast_without_cache(input_bn.device.type):
            start = model.conditioning(None) if config.self_cond_start == "null" else None
            first = model.embed(input_bn, valid_bn, start)
    cond = model.conditioning(first) if config.self_cond else None
    return model.embed(input_bn, valid_bn, cond, read_m)


def _autocast_without_cache(device_type: str) -> torch.autocast:
    """The current autocast, changed to keep no bf16 copies of weights.

    Copies that a pass without gradients makes have no graph (up to torch 2.10), and the next pass would use
    these copies.
    """
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(
        device_type, torch.get_autocast_dtype(device_type), enabled=enabled, cache_enabled=False
    )


def positions(mask_bn: Tensor, count: int | None = None) -> Tensor:
    """The positions where a mask is True, as indices into the flattened [b, n] grid, int64 [m].

    `count` must be m. Without it, m is read from the device, which waits until the device is idle.
    """
    mask = mask_bn.flatten()
    if count is None:
        return mask.nonzero()[:, 0]
    outside = mask.numel()  # fills the rest if `count` is too large: using it as an index fails
    return torch.nonzero_static(mask, size=count, fill_value=outside)[:, 0]


def losses(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    part: TrainingPart,
    maskable: int,
    modes: StepPlan,
) -> PartLosses:
    """What a micro-batch adds to the losses of its logical batch.

    `maskable` is the number of maskable positions in the logical batch, over which the critic's loss is
    averaged.
    """
    rows, valid_bn, masked_m, u_m = part.rows, part.valid_bn, part.masked_m, part.u_m
    sampled_m = torch.zeros_like(masked_m)
    look: cross_entropy.Look | None = None
    if modes.critic:
        assert u_m is not None

        def look(some: slice, logits: Tensor) -> None:
            sampled_m[some] = sample(logits, u_m[some], modes.temperature)

    with torch.set_grad_enabled(modes.generator_learns and torch.is_grad_enabled()):
        e_md = embeddings(model, config, rows.input_bn, valid_bn, masked_m, first_pass=modes.first_pass)
        head = model.head(e_md)
        generator = cross_entropy.weighted_sum(head, part.target_m, part.weight_m, vocabulary, look)
    if not modes.critic:
        return PartLosses(generator, None)
    filled_bn = rows.ids_bn.masked_scatter(rows.mask_bn, sampled_m)
    scores_bn = model.criticize(filled_bn, valid_bn, train_trunk=modes.generator_learns)
    scores_p = scores_bn.flatten()[part.maskable_p].float()
    labels_p = critic_labels(config, rows, filled_bn).flatten()[part.maskable_p]
    bce_p = F.binary_cross_entropy_with_logits(scores_p, labels_p.to(scores_p.dtype), reduction="none")
    return PartLosses(generator, bce_p.double().sum() / maskable)


def minimized(sums: PartLosses, config: ObjectiveConfig, modes: StepPlan, numerics_version: int) -> Tensor:
    """What a micro-batch adds to the step's `loss`, which is both reported and minimised.

    The critic's weight applies only if the generator trains too. Numerics version 1 always applied
    the weight, and so does the replay of steps of that version.
    """
    if sums.critic is None:
        return sums.generator
    if not modes.generator_learns:
        return sums.critic if numerics_version > 1 else config.critic_loss_weight * sums.critic
    return sums.generator + config.critic_loss_weight * sums.critic


def critic_labels(config: ObjectiveConfig, part: Corruption, filled_bn: Tensor) -> Tensor:
    """The critic's labels, bool [b, n]: True at wrong ids, or at masked positions (Lezama et al. 2022)."""
    return part.mask_bn if config.critic_labels == "token_critic" else filled_bn != part.ids_bn


def sample(logits_mv: Tensor, u_m: Tensor, temperature: float | Tensor) -> Tensor:
    """Sample an id for each row of logits from softmax(logits / temperature). Returns int64 [m].

    The inverse CDF maps the uniform numbers `u_m` to ids, computed in fp64, in chunks. The distribution is
    that of the argmax of logits / temperature + Gumbel noise, but one fp64 number per position is enough.
    Temperature 0 takes the most probable id. The temperature may also be a tensor, fp64 [m].
    """
    m, v = logits_mv.shape
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float64, device=logits_mv.device)
    temperature_m = temperature.expand(m)
    greedy_m = logits_mv.argmax(-1)
    sampled = []
    chunk = max(1, _SAMPLE_CHUNK[logits_mv.device.type] // v)
    for rows in (slice(start, start + chunk) for start in range(0, m, chunk)):
        logits = logits_mv[rows].double()
        # Subtract the largest logit before dividing, so that a tiny temperature cannot overflow.
        logits = logits - logits.amax(-1, keepdim=True)
        cdf = prefix_sums((logits / temperature_m[rows, None].clamp(min=1e-300)).exp())
        target = u_m[rows, None] * cdf[:, -1:]
        # right=True skips leading ids of probability 0, even if u is 0.
        sampled.append(torch.searchsorted(cdf, target, right=True)[:, 0])
    if not sampled:
        return greedy_m
    sampled_m = torch.cat(sampled)
    # u times the total can round up to the total, which is beyond the last id. A GPU rounds each prefix sum
    # in a different order, so an id of probability 0 can get an interval, and u can fall into it.
    inside_m = sampled_m.clamp(max=v - 1)
    impossible_m = (sampled_m >= v) | logits_mv.gather(1, inside_m[:, None])[:, 0].isneginf()
    return torch.where(impossible_m | (temperature_m == 0), greedy_m, inside_m)


def prefix_sums(x_mv: Tensor) -> Tensor:
    """The sums of the first 1, 2, ..., v numbers of each row, [m, v].

    torch has no deterministic kernel for these sums on CUDA. If kernels must be deterministic there, passes
    add to each sum the sum that is 1, 2, 4, ... places before it (Hillis and Steele, "Data parallel
    algorithms", CACM 1986).
    """
    if x_mv.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x_mv.cumsum(-1)
    distance, v = 1, x_mv.shape[-1]
    while distance < v:
        x_mv = torch.cat((x_mv[:, :distance], x_mv[:, distance:] + x_mv[:, :-distance]), dim=-1)
        distance *= 2
    return x_mv
