"""The losses and gradients of a training step, computed one micro-batch at a time.

Letters: s sequences of the logical batch, b sequences of a part, n positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from maskwire_server.batch import Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import draws, objective
from maskwire_server.training.batch_losses import BatchLosses
from maskwire_server.training.corruption import Masking, StepKey, Vocabulary, empty_part
from maskwire_server.training.draws import Purpose
from maskwire_server.training.micro_batch_split import split
from maskwire_server.training.models.generator_critic import Networks
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


def accumulate(
    networks: Networks,
    settings: StepSettings,
    batch: TensorBatch,
    modes: Modes,
    at: StepKey,
    ranks: Ranks,
    device: torch.device,
    numerics_version: int,
) -> BatchLosses:
    """Compute this rank's micro-batches on `device`. Return the sums of losses, and add up the gradients."""
    config = settings.objective
    there = batch.to(device)
    smallest = settings.smallest if numerics_version > 2 else None
    parts = ranks.parts(batch.lengths, settings.budget, smallest)
    everything = split(batch.lengths, settings.budget)
    masking = Masking.of(there, config, settings.vocabulary, at, everything)
    plan = objective.plan_step(
        config,
        at,
        has_critic=networks.critic is not None,
        train_generator=not modes.only_train_critic,
        train_critic=not modes.only_train_generator,
        temperature=modes.generator_sample_temperature,
    )
    sums = BatchLosses(int(masking.k_s.sum()), int(masking.n_s.sum()), device, critic=plan.critic)
    if not sums.masked:
        return sums
    weight_s = objective.position_weights(config, masking.n_s, masking.k_s)
    # autocast keeps its bf16 copies of the weights, and the node of the graph that made them, for later
    # passes. `fully_shard` takes a block's gradients when the block's backward pass ends; the node of an
    # earlier pass runs after that, so its gradients would be lost, or added to another step's.
    cached = not ranks.is_sharded
    with _seeded(at, ranks, device, draws_of_torch=settings.has_dropout):
        for part in parts:
            if part is None:
                ranks.begin_empty_part()
            row_b = [0] if part is None else part[0]  # an empty part stands for no sequence
            own = empty_part(device) if part is None else masking.corrupt(row_b, *there.take(*part))
            keys_b = draws.keys(Purpose.CRITIC_SAMPLE, at.seed, at.lineage, at.number, rows=row_b)
            with torch.autocast(device.type, torch.bfloat16, settings.bf16, cache_enabled=cached):
                losses = objective.losses(
                    networks,
                    config,
                    settings.vocabulary,
                    own,
                    weight_s[row_b].to(device),
                    sums.maskable,
                    plan,
                    keys_b.to(device),
                )
            sums.add(losses)
            total = objective.minimized(losses, config, plan, numerics_version)
            if total.requires_grad:  # False if everything that this step trains is frozen
                total.backward()  # type: ignore[no-untyped-call]
    return sums


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
