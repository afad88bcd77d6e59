"""The losses and gradients of a training step, computed one micro-batch at a time.

Letters: s sequences of the logical batch, b sequences of a part, n positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import draws, objective
from maskwire_server.training.batch_losses import BatchLosses
from maskwire_server.training.corruption import Masking, StepKey, Vocabulary, empty_part
from maskwire_server.training.draws import Purpose
from maskwire_server.training.micro_batch_split import Part, split
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.objective import StepPlan, TrainingPart
from maskwire_server.training.ranks_interface import Ranks
from maskwire_server.training.tensor_batch import TensorBatch


@dataclass(frozen=True)
class StepSettings:
    """The settings that the gradients of every step depend on."""

    objective: ObjectiveConfig
    vocabulary: Vocabulary
    budget: int
    """The maximum number of positions in a micro-batch."""
    smallest: int
    """A micro-batch with this many positions ends before a much shorter sequence: see `split_by_length`."""
    bf16: bool
    """Autocast to bfloat16."""
    has_dropout: bool
    """Whether the model draws from torch's own generator."""


@dataclass(frozen=True)
class PreparedStep:
    """A training step whose batch is masked and on the device: all that does not depend on the weights."""

    at: StepKey
    ranks: Ranks
    device: torch.device
    numerics_version: int
    plan: StepPlan
    parts: list[TrainingPart | None]
    """This rank's micro-batches. None is an empty one."""
    masked: int
    """The number of masked positions in the logical batch."""
    maskable: int
    """The number of maskable positions in the logical batch."""


class NextStep:
    """Keeps a step that was prepared ahead, until it is taken."""

    def __init__(self) -> None:
        self._kept: tuple[Batch, Modes, PreparedStep] | None = None

    def keep(self, batch: Batch, modes: Modes, step: PreparedStep) -> None:
        """Keep a step that was prepared from `batch` and `modes`."""
        self._kept = batch, modes, step

    def take(self, batch: Batch, modes: Modes, at: StepKey) -> PreparedStep | None:
        """Return the kept step if it is the step `at` with this same batch; otherwise discard it."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is batch and (kept[1], kept[2].at) == (modes, at):
            return kept[2]
        return None


def prepare(
    settings: StepSettings,
    batch: TensorBatch,
    modes: Modes,
    at: StepKey,
    ranks: Ranks,
    device: torch.device,
    numerics_version: int,
    *,
    has_critic: bool,
) -> PreparedStep:
    """Copy a batch to `device` and mask it there. Only Bernoulli masking waits for the device."""
    config = settings.objective
    plan = objective.plan_step(
        config,
        at,
        has_critic=has_critic,
        train_generator=not modes.only_train_critic,
        train_critic=not modes.only_train_generator,
        temperature=modes.generator_sample_temperature,
    )
    there = batch.to(device)
    every = ((part[0], there.take(*part)[2]) for part in split(batch.lengths, settings.budget))
    masking = Masking.of(batch.maskable_s, config, settings.vocabulary, at, every)
    masked, maskable = int(masking.k_s.sum()), int(masking.n_s.sum())
    weight_s = objective.position_weights(config, masking.n_s, masking.k_s)

    def prepared(part: Part | None) -> TrainingPart | None:
        if part is None:
            return None
        row_b, columns = part
        keys_b = None
        if plan.critic:
            keys_b = draws.keys(Purpose.CRITIC_SAMPLE, at.seed, at.lineage, at.number, rows=row_b)
        padded = int(batch.valid_s[row_b].sum()) < len(row_b) * columns
        rows = masking.corrupt(row_b, *there.take(row_b, columns))
        return TrainingPart.of(rows, weight_s[row_b], keys_b, padded=padded)

    smallest = settings.smallest if numerics_version > 2 else None
    parts = ranks.parts(batch.lengths, settings.budget, smallest) if masked else []
    found = [prepared(part) for part in parts]
    return PreparedStep(at, ranks, device, numerics_version, plan, found, masked, maskable)


def accumulate(networks: Networks, settings: StepSettings, step: PreparedStep) -> BatchLosses:
    """Compute this rank's micro-batches. Return the sums of losses, and add up the gradients.

    Nothing here reads from the device, so that it is never idle between two micro-batches.
    """
    config, vocabulary, plan = settings.objective, settings.vocabulary, step.plan
    device, ranks = step.device, step.ranks
    sums = BatchLosses(step.masked, step.maskable, device, critic=plan.critic)
    # autocast keeps its bf16 copies of the weights, and the node of the graph that made them, for later
    # passes. `fully_shard` takes a block's gradients when the block's backward pass ends; the node of an
    # earlier pass runs after that, so its gradients would be lost, or added to another step's.
    cached = not ranks.is_sharded
    with _seeded(step.at, ranks, device, draws_of_torch=settings.has_dropout):
        for each in step.parts:
            if each is None:
                ranks.begin_empty_part()
            part = each or _empty_part(device, plan)
            with torch.autocast(device.type, torch.bfloat16, settings.bf16, cache_enabled=cached):
                losses = objective.losses(networks, config, vocabulary, part, step.maskable, plan)
            sums.add(losses)
            total = objective.minimized(losses, config, plan, step.numerics_version)
            if total.requires_grad:  # False if everything that this step trains is frozen
                total.backward()  # type: ignore[no-untyped-call]
    return sums


def _empty_part(device: torch.device, plan: StepPlan) -> TrainingPart:
    one = torch.zeros(1, dtype=torch.int64)
    return TrainingPart.of(empty_part(device), one.double(), one if plan.critic else None, padded=False)


@contextlib.contextmanager
def _seeded(at: StepKey, ranks: Ranks, device: torch.device, *, draws_of_torch: bool) -> Iterator[None]:
    """Seed torch's random number generator for the dropout of a step, differently on each rank."""
    if not draws_of_torch:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    of_rank = (ranks.rank,) if ranks.rank else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(draws.key(Purpose.DROPOUT, at.seed, at.lineage, at.number, *of_rank))
        yield
