"""The table of the quadrature rule is what numpy computes, to the last bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from maskwire_server.training.quadrature import TABLE, gauss_legendre


def test_the_table_has_the_bytes_that_leggauss_gave() -> None:
    # Computed with leggauss(4096), to the same bytes on OpenBLAS's SkylakeX, Haswell and Nehalem kernels,
    # with one thread and two, and without numpy's SIMD. To compute it takes up to 33 seconds.
    table = np.load(TABLE, allow_pickle=False)
    assert (table.shape, table.dtype) == ((2, 2048), np.dtype("<f8"))
    expected = "e1061b5ab2d7fdf2445985ccc8a98ac42dac79594076e7a744bc387c87912c7e"
    assert hashlib.sha256(table.tobytes()).hexdigest() == expected


@pytest.mark.parametrize("power", [0, 1, 2, 3, 100, 4095, 8191])
def test_powers_up_to_twice_the_nodes_are_integrated_exactly(power: int) -> None:
    nodes, weights = gauss_legendre()
    assert np.all(np.diff(nodes) > 0)
    assert float((nodes**power * weights).sum()) == pytest.approx(1 / (power + 1), rel=1e-9)
