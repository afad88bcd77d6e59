"""Gauss-Legendre quadrature on [0, 1], from a table.

`gauss_legendre_4096.npy` holds the positive half of what numpy's `leggauss(4096)` returns, nodes and then
weights:

    nodes, weights = np.polynomial.legendre.leggauss(4096)
    np.save("gauss_legendre_4096.npy", np.stack([nodes[2048:], weights[2048:]]))

That call takes 7 to 33 seconds of CPU time in each process, because it computes the eigenvalues of a dense
4096 x 4096 matrix. Newton's iteration on the polynomial takes 0.8 s, but its weights differ from these by up
to 5e-7 at the ends, and probabilities computed with them differ by up to 3e-13: a replayed step would then
not have its recorded loss.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TABLE = Path(__file__).with_name("gauss_legendre_4096.npy")


@functools.cache
def gauss_legendre() -> tuple[Floats, Floats]:
    """The 4,096 nodes in [0, 1], ascending, and their weights, which sum to 1."""
    nodes, weights = np.load(TABLE, allow_pickle=False)
    # The rule on [-1, 1] is symmetric.
    nodes, weights = np.concatenate([-nodes[::-1], nodes]), np.concatenate([weights[::-1], weights])
    return (nodes + 1) / 2, weights / 2
