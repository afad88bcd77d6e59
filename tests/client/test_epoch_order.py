"""Epochs: each row once, in an order of its own, as a function of seed and step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maskwire.data.epoch_order import EpochOrder
from maskwire.data.token_data import TokenData


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 1000])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_each_epoch_has_every_row_once_and_batches_continue_into_the_next(rows: int, size: int) -> None:
    order = EpochOrder(rows, seed=5)
    steps = -(-3 * rows // size)
    found = np.concatenate([order.batch(step, size) for step in range(1, steps + 1)])
    assert found.size >= 3 * rows
    epochs = found[: 3 * rows].reshape(3, rows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    if rows == 1000:
        assert (epochs[0] != epochs[1]).any()
        assert (EpochOrder(rows, seed=6).batch(1, rows) != epochs[0]).any()


def test_the_order_does_not_change_between_versions() -> None:
    # A run that was stopped resumes with the rows of one that was not.
    assert EpochOrder(1000, seed=0).batch(1, 6).tolist() == [92, 723, 432, 714, 461, 206]
    assert EpochOrder(10**12, seed=3).batch(10**9, 2).tolist() == [933050029445, 942564483345]


def test_the_order_looks_random() -> None:
    """Neighbours in an epoch are independent: their mean distance is n/3, here within 3%."""
    rows = 20_000
    order = EpochOrder(rows, seed=1).batch(1, rows)
    assert abs(np.abs(np.diff(order)).mean() / (rows / 3) - 1) < 0.03
    assert abs(np.corrcoef(order, np.arange(rows))[0, 1]) < 0.03
    halves = (order[: rows // 2] < rows // 2).mean()
    assert abs(halves - 0.5) < 0.02


def test_data_in_epochs_covers_every_token_once(tmp_path: Path) -> None:
    documents = [np.arange(n) + 100 * k for k, n in enumerate([5, 8, 1, 13])]
    data = TokenData(documents, length=4, batch_size=3, seed=2, sampling="epochs")
    assert data.rows == 2 + 2 + 1 + 4
    assert data.steps_of(1) == 3
    rows = [row for step in (1, 2, 3) for row in data.batch(step)]
    assert sorted(np.concatenate(rows)) == sorted(np.concatenate(documents))
    assert data.steps_of(4) == 12
    with pytest.raises(ValueError, match="sampling must be one of crops, epochs, got 'shuffle'"):
        TokenData(documents, length=4, batch_size=3, sampling="shuffle")


def test_both_kinds_of_sampling_refuse_a_step_that_is_none() -> None:
    documents = [np.arange(n) for n in (5, 8)]
    for sampling in ("crops", "epochs"):
        data = TokenData(documents, length=4, batch_size=3, sampling=sampling)
        for step, words in ((0, "at least 1, got 0"), (-3, "at least 1, got -3"), (1.5, "a whole number")):
            with pytest.raises(ValueError, match=f"step must be {words}"):
                data.batch(step)  # type: ignore[arg-type]
        assert len(data.batch(1)) == 3


def test_sampling_and_batch_size_are_parts_of_the_fingerprint() -> None:
    made = [
        TokenData([np.arange(50)], length=4, batch_size=size, sampling=sampling).fingerprint()
        for size, sampling in ((2, "crops"), (2, "epochs"), (3, "epochs"))
    ]
    assert "sampling" not in made[0], "runs that were started before there were epochs go on"
    assert made[1] == made[0] | {"sampling": "epochs"}
    assert made[2] != made[1]
