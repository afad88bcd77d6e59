"""The batch of a training step, as data returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids, and what is known about them. `data.batch(step)` may return one for `fit`."""

    tokens: Any
    """Integers [rows, columns], or a list of rows that may differ in length."""
    lengths: Any = None
    """Integers [rows]: the positions of a row after its length are padding. Not with rows that differ."""
    prompt_mask: Any = None
    """Bool [rows, columns], or a list of rows: True for positions that are given and never masked."""
    segment_ids: Any = None
    """Integers, one per token: its document, where rows are packed with several. From 0, not decreasing."""
