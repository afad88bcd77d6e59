"""The evaluation as slow, simple code that enumerates rows, masks and orders one at a time.

`Predict` is log-probabilities [n, v] of a row's input ids [n], whose masked positions hold the mask id.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from maskwire_server.config import ObjectiveConfig
from maskwire_server.training.models.generator_critic import Networks

Predict = Callable[[torch.Tensor], torch.Tensor]
Mask = tuple[int, ...]


def predict_with(networks: Networks, objective: ObjectiveConfig, mask_id: int) -> Predict:
    """A model's distribution: the mask id has probability 0, both passes with self-conditioning."""

    def predict(seen: torch.Tensor) -> torch.Tensor:
        row = seen[None]
        generator = networks.generator
        with torch.no_grad():
            if objective.self_cond:
                start = generator.null_embed if objective.self_cond_start == "null" else None
                hidden = generator(row, None, generator(row, None, start))
            else:
                hidden = generator(row, None)
            logits = generator.project(hidden)[0]
        logits[:, mask_id] = -math.inf
        return logits - logits.logsumexp(-1, keepdim=True)

    return predict


def masks(positions: Sequence[int]) -> Iterator[Mask]:
    """Every set of at least one position."""
    for k in range(1, len(positions) + 1):
        yield from itertools.combinations(positions, k)


def masked(ids: torch.Tensor, mask: Mask, mask_id: int) -> torch.Tensor:
    seen = ids.clone()
    for i in mask:
        seen[i] = mask_id
    return seen


def cross_entropy(predict: Predict, ids: torch.Tensor, mask: Mask, mask_id: int) -> float:
    """The sum over the mask."""
    found = predict(masked(ids, mask, mask_id))
    return -sum(float(found[i, ids[i]]) for i in mask)


def nelbo(predict: Predict, ids: torch.Tensor, mask_id: int, positions: Sequence[int] | None = None) -> float:
    """sum over k of (1/k) times the mean over masks of k of their cross-entropy, in nats."""
    positions = range(len(ids)) if positions is None else positions
    total = 0.0
    for k in range(1, len(positions) + 1):
        costs = [cross_entropy(predict, ids, mask, mask_id) for mask in itertools.combinations(positions, k)]
        total += sum(costs) / len(costs) / k
    return total


def chain(predict: Predict, ids: torch.Tensor, mask_id: int, order: Sequence[int]) -> float:
    """-log p(ids) when positions are revealed in this order, in nats."""
    total = 0.0
    for i, position in enumerate(order):
        hidden = tuple(order[i:])
        total -= float(predict(masked(ids, hidden, mask_id))[position, ids[position]])
    return total
