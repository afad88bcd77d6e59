"""The batch of a training step, as `data.batch(step)` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskwire.signatures import refuse_unknown_keywords


@refuse_unknown_keywords
@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids, with their lengths, prompts and segments. `data.batch(step)` may return a Batch."""

    tokens: Any
    """Integers of shape [rows, columns], or a list of rows that may differ in length."""
    lengths: Any = None
    """Integers of shape [rows]: positions after a row's length are padding. Only for rows of one length."""
    prompt_mask: Any = None
    """Bool of shape [rows, columns], or a list of rows: True at the positions of a prompt, never masked."""
    segment_ids: Any = None
    """Integers, one per token: the number of the token's document in a packed row, from 0, not decreasing."""
