"""The losses and gradients of a training step, a micro-batch at a time.

Letters: b rows, n positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from maskwire_server.batch import Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import draws, objective
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary, corrupt, empty_part
from maskwire_server.training.draws import Purpose
from maskwire_server.training.evaluation import TensorBatch
from maskwire_server.training.micro_batches import BatchLosses, row_lengths
from maskwire_server.training.models.networks import Networks
from maskwire_server.training.ranks import Part, Ranks


@dataclass(frozen=True)
class StepSettings:
    """What the gradients of every step depend on."""

    objective: ObjectiveConfig
    vocabulary: Vocabulary
    budget: int
    """Positions of a micro-batch, at most."""
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
    """Add up the losses and gradients of this rank's micro-batches, computed on `device`."""
    config = settings.objective
    there = batch.to(device)
    corrupted = corrupt(there.ids_rn, there.valid_rn, there.prompt_rn, config, settings.vocabulary, at)
    plan = objective.plan_step(
        config,
        at,
        has_critic=networks.critic is not None,
        train_generator=not modes.only_train_critic,
        train_critic=not modes.only_train_generator,
        temperature=modes.generator_sample_temperature,
    )
    sums = BatchLosses(int(corrupted.k_b.sum()), int(corrupted.n_b.sum()), device, critic=plan.critic)
    if not sums.masked:
        return sums
    weight_b = objective.position_weights(config, corrupted.n_b, corrupted.k_b).to(device)
    rows = range(batch.ids_rn.shape[0])
    keys_b = draws.keys(Purpose.CRITIC_SAMPLE, at.seed, at.lineage, at.number, rows=rows).to(device)
    with _seeded(at, ranks, device, draws_of_torch=settings.has_dropout):
        for part in ranks.parts(row_lengths(batch.valid_rn), settings.budget):
            where, own = _rows(corrupted, part, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
                losses = objective.losses(
                    networks,
                    config,
                    settings.vocabulary,
                    own,
                    weight_b[where],
                    sums.maskable,
                    plan,
                    keys_b[where],
                )
            sums.add(losses)
            total = objective.minimized(losses, config, plan, numerics_version)
            if total.requires_grad:  # False if all that this step trains is frozen
                total.backward()  # type: ignore[no-untyped-call]
    return sums


def _rows(corrupted: Corruption, part: Part | None, device: torch.device) -> tuple[slice, Corruption]:
    """The rows of a part; of an empty part a row that stands for none."""
    if part is None:
        return slice(0, 1), empty_part(device)
    where, columns = part
    return where, corrupted.rows(where, columns)


@contextlib.contextmanager
def _seeded(at: StepKey, ranks: Ranks, device: torch.device, *, draws_of_torch: bool) -> Iterator[None]:
    """Seed torch's generator for the dropout of a step, on each rank otherwise."""
    if not draws_of_torch:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    of_rank = (ranks.rank,) if ranks.rank else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(draws.key(Purpose.DROPOUT, at.seed, at.lineage, at.number, *of_rank))
        yield
