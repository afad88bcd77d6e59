"""The masked positions of a logical batch, and the ids that the model sees there.

Each random draw belongs to a sequence, or to a position counted from the start of its sequence, so it does
not depend on how the batch is split.

Letters: s sequences of the logical batch, b sequences of a part, n positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training import draws, masking_schedule
from maskwire_server.training.device_copies import upload
from maskwire_server.training.draws import Purpose


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model: the number of ids, the mask id, and the pad id if there is one."""

    num_tokens: int
    mask_id: int
    pad_id: int | None

    @staticmethod
    def of(config: ModelConfig) -> Vocabulary:
        """The vocabulary that a model's configuration describes."""
        return Vocabulary(config.num_tokens, config.mask_id, config.pad_id)

    @property
    def special(self) -> list[int]:
        """The special ids in ascending order: the mask id, and the pad id if there is one."""
        return sorted({self.mask_id} | ({self.pad_id} if self.pad_id is not None else set()))


@dataclass(frozen=True)
class StepKey:
    """Identifies a training step in the keys of its random draws."""

    seed: int
    lineage: int
    number: int


@dataclass(frozen=True)
class Corruption:
    """Sequences with their masks, and the ids that the model sees."""

    ids_bn: Tensor
    """int64, 0 under padding."""
    valid_bn: Tensor
    """bool, False under padding."""
    maskable_bn: Tensor
    """bool: valid and not part of a prompt."""
    mask_bn: Tensor
    """bool: the positions that the model must predict."""
    input_bn: Tensor
    """int64: what the model sees."""
    n_b: Tensor
    """int64: the number of maskable positions."""
    k_b: Tensor
    """int64: the number of masked positions."""

    def to(self, device: torch.device) -> Corruption:
        """Copy the sequences to a device."""
        return Corruption(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def empty_part(device: torch.device) -> Corruption:
    """Make a sequence of one position that cannot be masked, for a rank that has no rows left to compute."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    no = torch.zeros(1, 1, dtype=torch.bool, device=device)
    count = torch.zeros(1, dtype=torch.int64)
    return Corruption(ids, ~no, no, no, ids, count, count)


@dataclass(frozen=True)
class Masking:
    """How the sequences of a logical batch are masked for training.

    The times and the counts, which rounding could change, are computed on the host, so that every device
    masks the same positions.
    """

    config: ObjectiveConfig
    vocabulary: Vocabulary
    step: StepKey
    n_s: Tensor
    """int64: the number of maskable positions."""
    fraction_s: Tensor
    """fp64: the masked fraction m(t) at each sequence's time t."""
    k_s: Tensor
    """int64: the number of masked positions."""

    @staticmethod
    def of(
        n_s: Tensor,
        config: ObjectiveConfig,
        vocabulary: Vocabulary,
        step: StepKey,
        parts: Iterable[tuple[list[int], Tensor]],
        schedule: masking_schedule.Schedule | None = None,
    ) -> Masking:
        """Draw the times and counts of sequences with `n_s` maskable positions.

        `parts` are the indices of all sequences, in parts, with their maskable positions, bool [b, n]. They
        are read only for Bernoulli masking, where each part is masked on its device to get the counts.
        `schedule` overrides the configured schedule.
        """
        at = step.seed, step.lineage, step.number
        chosen = schedule or masking_schedule.named(config.schedule)
        rows = range(n_s.numel())
        permutation_s = draws.uniform(draws.keys(Purpose.PERMUTATION, *at, rows=rows), 1)[:, 0].argsort()
        t_s = masking_schedule.stratified_times(draws.uniform_scalar(Purpose.TIME, *at), permutation_s)
        if config.masking == "exact":
            counts = masking_schedule.exact_counts(chosen, t_s, n_s)
            return Masking(config, vocabulary, step, n_s, chosen.fraction(t_s), counts)
        masking = Masking(config, vocabulary, step, n_s, chosen.fraction(t_s), torch.zeros_like(n_s))
        for row_b, maskable_bn in parts:
            masking.k_s[row_b] = masking.mask(row_b, maskable_bn).sum(-1).cpu()
        return masking

    def mask(self, row_b: list[int], maskable_bn: Tensor) -> Tensor:
        """Choose the positions to predict in the sequences `row_b`, as a bool tensor of shape [b, n]."""
        step, device = self.step, maskable_bn.device
        keys = draws.keys(Purpose.MASK, step.seed, step.lineage, step.number, rows=row_b)
        keys_b = upload(keys, device)
        if self.config.masking == "exact":
            return mask_exactly(keys_b, maskable_bn, upload(self.k_s[row_b], device))
        fraction_b = upload(self.fraction_s[row_b], device)
        return maskable_bn & (_by_order(keys_b, maskable_bn) < fraction_b[:, None])

    def corrupt(self, row_b: list[int], ids_bn: Tensor, valid_bn: Tensor, maskable_bn: Tensor) -> Corruption:
        """Mask the sequences `row_b`, on the device of their tensors."""
        mask_bn = self.mask(row_b, maskable_bn)
        input_bn = torch.where(mask_bn, self.vocabulary.mask_id, ids_bn)
        if self.config.augments:
            input_bn = _augment(input_bn, ids_bn, mask_bn, row_b, self)
        return Corruption(ids_bn, valid_bn, maskable_bn, mask_bn, input_bn, self.n_s[row_b], self.k_s[row_b])


def _by_order(keys_b: Tensor, maskable_bn: Tensor) -> Tensor:
    """A uniform random number in [0, 1) for each position, as an fp64 tensor of shape [b, n].

    The i-th maskable position of a row gets the i-th number of the row's key, so that padding and prompts do
    not change the draws of a row.
    """
    order_bn = (maskable_bn.cumsum(-1) - 1).clamp(min=0)
    return draws.uniform(keys_b, maskable_bn.shape[1]).gather(1, order_bn)


def random_ranks(keys_b: Tensor, maskable_bn: Tensor) -> Tensor:
    """The ranks of the maskable positions in random order; the others rank last. int64, shape [b, n]."""
    numbers_bn = _by_order(keys_b, maskable_bn).masked_fill(~maskable_bn, 2.0)
    order_bn = numbers_bn.argsort(-1)
    rank = torch.arange(numbers_bn.shape[1], device=order_bn.device).expand_as(order_bn)
    return torch.empty_like(order_bn).scatter_(1, order_bn, rank)


def mask_exactly(keys_b: Tensor, maskable_bn: Tensor, k_b: Tensor) -> Tensor:
    """Choose k random maskable positions in each row, as a bool tensor of shape [b, n]."""
    return random_ranks(keys_b, maskable_bn) < k_b[:, None]


def coin(step: StepKey, which: int, probability: float) -> bool:
    """Whether a random event of the given probability happens to the whole batch of a step.

    `which` is the event: 0 keeps ids, 1 draws random ids, 2 runs the first pass of self-conditioning.
    """
    return draws.uniform_scalar(Purpose.COINS, step.seed, step.lineage, step.number, which) < probability


def _augment(input_bn: Tensor, ids_bn: Tensor, mask_bn: Tensor, row_b: list[int], masking: Masking) -> Tensor:
    config, vocabulary, step = masking.config, masking.vocabulary, masking.step
    at, n = (step.seed, step.lineage, step.number), ids_bn.shape[1]

    def uniform(purpose: Purpose) -> Tensor:
        return draws.uniform(upload(draws.keys(purpose, *at, rows=row_b), ids_bn.device), n)

    a_bn = uniform(Purpose.AUGMENT)
    kept = a_bn < config.no_replace_prob
    replaced = ~kept & (a_bn < config.no_replace_prob + config.random_token_prob)
    if coin(step, 0, config.augment_prob):
        input_bn = torch.where(mask_bn & kept, ids_bn, input_bn)
    if coin(step, 1, config.augment_prob):
        replacement_bn = random_ids(uniform(Purpose.RANDOM_ID), vocabulary)
        input_bn = torch.where(mask_bn & replaced, replacement_bn, input_bn)
    return input_bn


def random_ids(u: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Map uniform numbers `u` in [0, 1) to equally likely ids of data: int64, in the shape of `u`."""
    special = vocabulary.special
    ids = (u * (vocabulary.num_tokens - len(special))).to(torch.int64)
    for skipped in special:  # ascending, because skipping one id can lead to the next one
        ids = ids + (ids >= skipped)
    return ids
