"""Generation as slow, simple code: one row at a time, and distributions by enumeration (n <= 6)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from maskwire_server.batch import Prompts

Conditional = Callable[[tuple[int, ...], int], list[float]]
"""(a row with the mask id where masked, a position) -> the probability of each id there."""


def any_order(conditional: Conditional, row: Sequence[int], mask_id: int) -> dict[tuple[int, ...], float]:
    """How often random order, one position a pass, gives each completion of a row.

    The mean over all orders of the product of the conditionals along the order.
    """
    unknown = [i for i, id_ in enumerate(row) if id_ == mask_id]
    orders = list(itertools.permutations(unknown))
    found: dict[tuple[int, ...], float] = {}
    for order in orders:
        paths = {tuple(row): 1 / len(orders)}
        for position in order:
            longer: dict[tuple[int, ...], float] = {}
            for seen, probability in paths.items():
                for id_, share in enumerate(conditional(seen, position)):
                    if share:
                        filled = (*seen[:position], id_, *seen[position + 1 :])
                        longer[filled] = longer.get(filled, 0.0) + probability * share
            paths = longer
        for filled, probability in paths.items():
            found[filled] = found.get(filled, 0.0) + probability
    return found


def counts(fraction: Callable[[float], float], unknown: int, steps: int) -> list[int]:
    """How many positions stay masked after each pass, until none does."""
    left, found = unknown, []
    for step in itertools.count(1):
        if not left:
            return found
        planned = left - 1 if not steps else math.floor(fraction(step / steps) * unknown + 1e-9)
        left = min(planned, left - 1)
        found.append(left)
    raise AssertionError


def shaped(probabilities: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities at a temperature, of the top k, of these the fewest that together reach top p."""
    heated = [p ** (1 / temperature) if p else 0.0 for p in probabilities]
    ranked = sorted(range(len(heated)), key=lambda i: -heated[i])
    if top_k:
        ranked = ranked[:top_k]
    total = sum(heated[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += heated[i] / total
    rest = sum(heated[i] for i in kept)
    return [heated[i] / rest if i in kept else 0.0 for i in range(len(heated))]


def sure(order: str, probabilities: list[float], sampled: int) -> float:
    """How sure an order is of a position: the largest is revealed first."""
    if order == "confidence":
        return math.log(probabilities[sampled])
    first, second = sorted(probabilities)[:-3:-1]
    if order == "margin":
        return first - second
    return sum(p * math.log(p) for p in probabilities if p)


def stays(scores: dict[int, float], count: int) -> set[int]:
    """The positions that stay masked: those with the lowest scores."""
    return set(sorted(scores, key=lambda i: scores[i])[:count])


def prompts_of(rows: list[list[int | None]]) -> Prompts:
    """Rows that may differ in length, None where nothing is given."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    shape = (len(rows), int(lengths.max()))
    ids, known = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for place, row in enumerate(rows):
        for column, id_ in enumerate(row):
            if id_ is not None:
                ids[place, column], known[place, column] = id_, True
    return Prompts(ids, np.arange(shape[1]) < lengths[:, None], known, lengths)
