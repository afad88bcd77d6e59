"""Generation by iterative unmasking: all unknown positions are masked, and each pass reveals some of them.

After pass s of S, min(floor(m(s/S) U), before - 1) of a row's U unknown positions are still masked, where
`before` were masked before the pass (Chang et al. 2022, with the schedule m of the training). In random
order, with one position per pass and temperature 1, the tokens have the distribution

    p(x) = mean over orders o of prod over i of p(x_o(i) | x_o(1) ... x_o(i-1)).

The evaluation estimates a lower bound of log p(x) (Uria et al. 2014). All other settings sample from other
distributions.
The draws of a row depend only on its seed, the pass and the position.

Letters: b rows, n positions, v vocabulary, m selected positions, k ids that may be sampled. This module
depends on no model class. Logits are computed only where they are needed, so that there is no tensor
of shape [b, n, v].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskwire_server.batch import Prompts
from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import Diverged, Unwanted
from maskwire_server.results import GenerateOptions, GenerationState, Order, SelfCondMode
from maskwire_server.training import draws, masking_schedule, objective
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.cross_entropy import forbid_special
from maskwire_server.training.draws import Purpose
from maskwire_server.training.objective import Model

MASKGIT_CHOICE_TEMPERATURE = 4.5  # Chang et al. 2022
COLDEST = 1e-3
"""An annealed temperature below this value is set to 0. x-transformers raises it to this value instead, at
which samples are the most probable ids except for near-ties."""


@dataclass(frozen=True)
class Rows:
    """The state of some rows on the device, between two passes."""

    ids_bn: Tensor
    """int64, the mask id where masked, 0 under padding."""
    valid_bn: Tensor
    """bool, False under padding."""
    unknown_bn: Tensor
    """bool: neither padding nor part of the prompt."""
    mask_bn: Tensor
    """bool: still masked."""
    recorded_bn: Tensor
    """fp64: the log-probability of a token when it was revealed."""
    token_keys_b: Tensor
    order_keys_b: Tensor
    noise_keys_b: Tensor
    """int64 each: keys of the draws. All passes use the same order of a row's positions, a permutation."""
    carried_bnd: Tensor | None
    """The embeddings of the previous pass. None before the first pass, or if they are not used."""

    def take(self, which_b: Tensor) -> Rows:
        """Select the rows at the indices `which_b`."""
        carried_bnd = None if self.carried_bnd is None else self.carried_bnd[which_b]
        return Rows(
            self.ids_bn[which_b],
            self.valid_bn[which_b],
            self.unknown_bn[which_b],
            self.mask_bn[which_b],
            self.recorded_bn[which_b],
            self.token_keys_b[which_b],
            self.order_keys_b[which_b],
            self.noise_keys_b[which_b],
            carried_bnd,
        )

    def put(self, which_b: Tensor, part: Rows) -> Rows:
        """Replace the rows at the indices `which_b` by those of `part`, in place, and return all rows."""
        self.ids_bn[which_b] = part.ids_bn
        self.mask_bn[which_b] = part.mask_bn
        self.recorded_bn[which_b] = part.recorded_bn
        if part.carried_bnd is None:
            return self
        carried = self.carried_bnd
        if carried is None:
            carried = part.carried_bnd.new_zeros((self.ids_bn.shape[0], *part.carried_bnd.shape[1:]))
        carried[which_b] = part.carried_bnd
        return replace(self, carried_bnd=carried)


@dataclass(frozen=True)
class PassPlan:
    """What an unmasking pass does to its rows."""

    step: int
    """The number of the pass, counted from 1."""
    stay_b: Tensor
    """int64: the number of positions that stay masked."""
    noise_b: Tensor
    """fp64: the scale of the noise that is added to the scores."""
    temperature_b: Tensor | None
    """fp64: the annealed temperature; None: that of the options."""

    def rows(self, which_b: Tensor, device: torch.device) -> PassPlan:
        """The plan for the rows at the indices `which_b`, on a device."""
        temperature_b = None if self.temperature_b is None else self.temperature_b[which_b].to(device)
        return PassPlan(
            self.step, self.stay_b[which_b].to(device), self.noise_b[which_b].to(device), temperature_b
        )


def generate(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    prompts: Prompts,
    options: GenerateOptions,
    *,
    budget: int,
    device: torch.device,
    ema_weights: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[GenerationState]:
    """Fill in the prompts, and yield a state after each pass. Run it without gradients.

    Finished rows are left out of later passes, and at most `budget` positions are computed together. Each
    pass has the width of the batch, so that a row's result does not depend on the lengths of other rows. With
    SelfCondMode.CARRY, embeddings are kept for at most `budget` positions: the rows are computed in groups of
    that size, one group after the other, and each group counts its passes from 1. Raises Diverged if the
    model's output is not finite. `wanted` is called before each part of a pass. If it returns False, Unwanted
    is raised.
    """
    whole = begin(prompts, vocabulary, options.row_seeds, device)
    unknown_b = torch.from_numpy(prompts.unknown.sum(-1))
    left_b, most = unknown_b.clone(), 0
    part_rows = max(1, budget // prompts.ids.shape[1])
    carries = config.self_cond and options.self_cond_mode is SelfCondMode.CARRY
    together = part_rows if carries else len(left_b)
    for group_b in torch.split((unknown_b > 0).nonzero()[:, 0], together):
        at_b = group_b.to(device)
        rows, step = whole.take(at_b), 0
        while bool((left_b[group_b] > 0).any()):
            step += 1
            plan = plan_pass(config, options, unknown_b[group_b], left_b[group_b], step)
            for which_b in torch.split((left_b[group_b] > 0).nonzero()[:, 0], part_rows):
                if not wanted():
                    raise Unwanted("the generation was cancelled: its client no longer waits for it")
                where_b = which_b.to(device)
                part = advance(
                    model, config, vocabulary, rows.take(where_b), plan.rows(which_b, device), options
                )
                rows = rows.put(where_b, part)
            whole.ids_bn[at_b] = rows.ids_bn
            left_b[group_b] = plan.stay_b
            most = max(most, step)
            done = not bool((left_b > 0).any())
            ids_bn = whole.ids_bn.masked_fill(~whole.valid_bn, vocabulary.pad_id or 0)
            ids = ids_bn.cpu().numpy().astype(narrowest(vocabulary))
            yield GenerationState(ids, tuple(left_b.tolist()), most if done else step, ema_weights)


def begin(prompts: Prompts, vocabulary: Vocabulary, row_seeds: Sequence[int], device: torch.device) -> Rows:
    """The state of the rows before the first pass: the prompts, with all unknown positions masked."""
    valid_bn, unknown_bn = torch.from_numpy(prompts.valid), torch.from_numpy(prompts.unknown)
    ids_bn = torch.from_numpy(prompts.ids).masked_fill(~valid_bn, 0)
    ids_bn = torch.where(unknown_bn, vocabulary.mask_id, ids_bn)
    recorded_bn = torch.zeros(ids_bn.shape, dtype=torch.float64)
    purposes = (Purpose.GENERATION_TOKEN, Purpose.GENERATION_ORDER, Purpose.GENERATION_NOISE)
    token_b, order_b, noise_b = (draws.keys(purpose, rows=list(row_seeds)).to(device) for purpose in purposes)
    return Rows(
        ids_bn.to(device),
        valid_bn.to(device),
        unknown_bn.to(device),
        unknown_bn.clone().to(device),
        recorded_bn.to(device),
        token_b,
        order_b,
        noise_b,
        None,
    )


def narrowest(vocabulary: Vocabulary) -> np.dtype[np.integer]:
    """The narrowest of the types uint8, uint16 and int32 that holds every id of the vocabulary."""
    if vocabulary.num_tokens <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if vocabulary.num_tokens <= 2**16 else np.int32)


def plan_pass(
    config: ObjectiveConfig, options: GenerateOptions, unknown_b: Tensor, left_b: Tensor, step: int
) -> PassPlan:
    """Plan pass number `step`, counted from 1, for all rows.

    In pass s of S, the noise on the order and an annealed temperature are proportional to 1 - s/S, as in
    MaskGIT and in x-transformers.
    """
    steps_b = torch.full_like(unknown_b, options.steps) if options.steps else unknown_b
    scale = options.choice_temperature
    if scale is None:
        scale = MASKGIT_CHOICE_TEMPERATURE if config.preset == "maskgit" else 0.0
    left_share_b = (1 - step / steps_b.clamp(min=1).double()).clamp(min=0)
    temperature_b = None
    if options.start_temperature is not None:
        temperature_b = options.start_temperature * left_share_b
        temperature_b = torch.where(temperature_b < COLDEST, 0.0, temperature_b)
    return PassPlan(
        step,
        stay_masked(masking_schedule.named(config.schedule), unknown_b, left_b, step, options.steps),
        scale * left_share_b,
        temperature_b,
    )


def stay_masked(
    masking: masking_schedule.Schedule, unknown_b: Tensor, before_b: Tensor, step: int, steps: int
) -> Tensor:
    """The number of positions of each row that stay masked after a pass, int64 [b].

    After pass s of S, it is min(floor(m(s/S) U), before - 1), for a schedule m and U unknown positions, of
    which `before` were masked before the pass. With `steps` 0, each pass reveals one position, whatever the
    schedule, because evaluations assume this. With the linear schedule, that is the same as S = U.
    """
    one_less_b = (before_b - 1).clamp(min=0)
    if not steps:
        return one_less_b
    fraction = masking.fraction(torch.tensor(min(1.0, step / steps), dtype=torch.float64))
    # (1 - 1/3) * 3 can round to just below 2, and its floor would reveal one position too many.
    return torch.minimum(torch.floor(fraction * unknown_b + 1e-9).to(torch.int64), one_less_b)


def advance(
    model: Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    rows: Rows,
    plan: PassPlan,
    options: GenerateOptions,
) -> Rows:
    """Compute one pass over rows that still have masked positions, and return their new state."""
    valid = None if bool(rows.valid_bn.all()) else rows.valid_bn
    n = rows.ids_bn.shape[1]
    read_bn = rows.mask_bn
    if options.order is Order.RANDOM:
        # The order does not depend on the tokens, so logits are needed only at positions to reveal.
        stay_bn = lowest(draws.uniform(rows.order_keys_b, n), rows.mask_bn, plan.stay_b)
        read_bn = rows.mask_bn & ~stay_bn
    read_m = objective.positions(read_bn)
    carried_bnd = None
    if config.self_cond and options.self_cond_mode is SelfCondMode.CARRY:
        carried_bnd = model.embed(rows.ids_bn, valid, model.conditioning(rows.carried_bnd))
        e_md = carried_bnd.flatten(0, 1)[read_m]
    else:
        e_md = objective.embeddings(model, config, rows.ids_bn, valid, read_m, first_pass=config.self_cond)
    logits_mv = forbid_special(model.project(e_md), vocabulary)
    total_m = check(logits_mv.logsumexp(-1))  # before the logits are used to sample
    u_m = draws.uniform(draws.nth(rows.token_keys_b, plan.step), n).flatten()[read_m]
    temperature: float | Tensor = options.temperature
    if plan.temperature_b is not None:
        temperature = plan.temperature_b[:, None].expand(-1, n).flatten()[read_m]
    sampled_m = sample(logits_mv, u_m, temperature, options)
    confidence_m = (logits_mv.gather(1, sampled_m[:, None])[:, 0] - total_m).double()
    filled_bn = rows.ids_bn.masked_scatter(read_bn, sampled_m)
    recorded_bn = rows.recorded_bn
    if options.order is not Order.RANDOM:
        recorded_bn = recorded_bn.masked_scatter(rows.mask_bn, confidence_m)
        if options.order is Order.CRITIC and bool(plan.stay_b.any()):
            scores_bn = -model.criticize(filled_bn, valid, train_trunk=False).double()
            check(scores_bn[rows.valid_bn], "the critic's scores")
        elif options.order in (Order.MARGIN, Order.ENTROPY):
            scores_bn = recorded_bn.masked_scatter(rows.mask_bn, certainty(logits_mv, options.order))
        else:
            scores_bn = recorded_bn
        if bool(plan.noise_b.any()):
            noise_bn = gumbel(draws.uniform(draws.nth(rows.noise_keys_b, plan.step), n))
            scores_bn = scores_bn + plan.noise_b[:, None] * noise_bn
        candidates_bn = rows.unknown_bn if options.remasking else rows.mask_bn
        stay_bn = lowest(scores_bn, candidates_bn, plan.stay_b)
    return replace(
        rows,
        ids_bn=filled_bn.masked_fill(stay_bn, vocabulary.mask_id),
        mask_bn=stay_bn,
        recorded_bn=recorded_bn,
        carried_bnd=carried_bnd,
    )


def sample(logits_mv: Tensor, u_m: Tensor, temperature: float | Tensor, options: GenerateOptions) -> Tensor:
    """Sample an id for each row of logits, with top_k and top_p. Returns int64 [m].

    top_k applies first. top_p then sorts the ids by their probability at the temperature, and keeps each id
    before which the probabilities sum to less than top_p (Holtzman et al. 2020). The temperature is a number,
    or a tensor, fp64 [m]. Temperature 0 takes the most probable id.
    """
    if not isinstance(temperature, Tensor):
        if not temperature:
            return objective.sample(logits_mv, u_m, temperature)
        scale: float | Tensor = max(temperature, 1e-30)
    else:
        scale = temperature[:, None].clamp(min=1e-30).to(logits_mv.dtype)
    v = logits_mv.shape[1]
    kept_mk, ids_mk = logits_mv, None
    if 0 < options.top_k < v:
        kept_mk, ids_mk = logits_mv.topk(options.top_k)
    if options.top_p < 1:
        if ids_mk is None:
            kept_mk, ids_mk = logits_mv.sort(dim=-1, descending=True, stable=True)
        shifted_mk = kept_mk - kept_mk[:, :1]  # so that a tiny temperature cannot overflow
        p_mk = (shifted_mk / scale).softmax(-1)
        outside_mk = objective.prefix_sums(p_mk) - p_mk >= options.top_p
        outside_mk[:, 0] = False
        kept_mk = kept_mk.masked_fill(outside_mk, float("-inf"))
    chosen_m = objective.sample(kept_mk, u_m, temperature)
    return chosen_m if ids_mk is None else ids_mk.gather(1, chosen_m[:, None])[:, 0]


def check(values: Tensor, what: str = "the generator's logits") -> Tensor:
    """Return `values`. Raises Diverged if one of them is not finite. For logits, pass their logsumexp."""
    if not bool(values.isfinite().all()):
        raise Diverged(f"the weights have diverged: {what} are not finite; restore an earlier checkpoint")
    return values


def certainty(logits_mv: Tensor, order: Order) -> Tensor:
    """The generator's certainty, fp64 [m]: the margin of the top two probabilities, or minus the entropy."""
    if order is Order.MARGIN:
        two_m2 = (logits_mv.topk(2).values - logits_mv.logsumexp(-1, keepdim=True)).exp()
        return (two_m2[:, 0] - two_m2[:, 1]).double()
    # entr(p) = -p ln p, and 0 for p = 0.
    entropy_m: Tensor = torch.special.entr(logits_mv.softmax(-1)).sum(-1)
    return -entropy_m.double()


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), in the same shape."""
    return -(-u.clamp(min=2.0**-54).log()).log()


def lowest(scores_bn: Tensor, candidates_bn: Tensor, k_b: Tensor) -> Tensor:
    """The k candidates of each row with the lowest scores, bool [b, n]. Ties go to later positions."""
    scores_bn = scores_bn.masked_fill(~candidates_bn, float("-inf"))
    order_bn = scores_bn.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores_bn.shape[1], device=scores_bn.device).expand_as(order_bn)
    place_bn = torch.empty_like(order_bn).scatter_(1, order_bn, place)
    revealed_b = candidates_bn.sum(-1) - k_b
    return candidates_bn & (place_bn >= revealed_b[:, None])
