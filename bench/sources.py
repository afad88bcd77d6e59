"""Sources whose best achievable likelihood is known."""

from __future__ import annotations

from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]


def pairs(rng: np.random.Generator, rows: int, n: int, symbols: int) -> Ids:
    """Uniform tokens, each of them twice in a row: int64 [rows, n], n even. Best: ln(symbols)/2 per token."""
    return np.repeat(rng.integers(0, symbols, (rows, n // 2)), 2, axis=1)


def flip_chain(rng: np.random.Generator, rows: int, n: int = 16, flip: float = 0.1) -> Ids:
    """A binary Markov chain from a fair start: int64 [rows, n]. Best: (ln 2 + (n-1) h(flip))/n per token."""
    flips = rng.random((rows, n)) < flip
    flips[:, 0] = rng.random(rows) < 0.5
    return flips.cumsum(1) % 2
