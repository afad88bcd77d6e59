"""The batch of a training step, as data returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskwire.signatures import refuse_unknown_keywords


@refuse_unknown_keywords
@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids, and what is known about them. `data.batch(step)` may return one for `fit`."""

    tokens: Any
    """Integers [rows, columns], or a list of rows that may differ in length."""
    lengths: Any = None
    """Integers [rows]: positions after a row's length are padding. Not allowed if rows differ in length."""
    prompt_mask: Any = None
    """Bool [rows, columns], or a list of rows: True for positions that are given and never masked."""
    segment_ids: Any = None
    """Integers, one per token: the number of its document in a packed row, from 0 and not decreasing."""
