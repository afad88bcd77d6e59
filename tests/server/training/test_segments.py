"""Packed rows: each segment is what the objective calls a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import make, state

from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training import numerics
from maskwire_server.training.tensor_batch import TensorBatch

SIZES = [5, 7, 12, 1, 3, 8, 12, 2, 2, 9, 1, 4]
"""Of documents, in the order in which they fill rows of at most 12."""
COLUMNS = 12
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-conditioning and critic": {"self_cond": True, "self_cond_prob": 1.0, "critic": "self"},
    "bernoulli": {"masking": "bernoulli", "weighting": "masked_mean", "schedule": "cosine"},
    "augmented": {"no_replace_prob": 0.2, "random_token_prob": 0.3},
}


def documents() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids, and which of them are a prompt."""
    random = np.random.default_rng(5)
    return (
        [random.integers(0, 15, size) for size in SIZES],
        [random.random(size) < 0.3 for size in SIZES],
    )


def ragged(rows: list[np.ndarray], prompts: list[np.ndarray], segments: Any = None) -> Batch:
    lengths = np.array([row.size for row in rows], dtype=np.int32)
    grid = np.zeros((len(rows), int(lengths.max())), dtype=bool)
    for row, prompt in zip(grid, prompts, strict=True):
        row[: prompt.size] = prompt
    bits = np.packbits(grid, bitorder="little").tobytes()
    return Batch(np.concatenate(rows), len(rows), grid.shape[1], lengths, bits, segments)


def unpacked() -> Batch:
    return ragged(*documents())


def packed() -> Batch:
    """Each document goes into the current row if it fits, or else into a new one."""
    rows: list[list[int]] = [[]]
    for number, size in enumerate(SIZES):
        if sum(SIZES[each] for each in rows[-1]) + size > COLUMNS:
            rows.append([])
        rows[-1].append(number)
    assert max(map(len, rows)) > 2
    ids, prompts = documents()
    numbers = [each for row in rows for at, number in enumerate(row) for each in [at] * SIZES[number]]
    return ragged(
        [np.concatenate([ids[number] for number in row]) for row in rows],
        [np.concatenate([prompts[number] for number in row]) for row in rows],
        np.array(numbers, dtype=np.int32),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [24, 4096])
def test_packed_rows_train_as_their_documents(name: str, budget: int) -> None:
    results, states = [], []
    for batch in (unpacked(), packed()):
        trainer = make(MODELS[name], micro_batch_tokens=budget, threads=1)
        results.append([trainer.train_step(1, step, batch, Modes()) for step in (1, 2, 3)])
        states.append(state(trainer))
    assert results[0] == results[1]
    assert results[0][0].losses.loss > 0
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("chain_rule", [False, True])
def test_packed_rows_are_evaluated_as_their_documents(chain_rule: bool) -> None:
    trainer = make({"self_cond": True}, threads=1)
    options = EvalOptions(tuple(range(100, 112)), 3, chain_rule=chain_rule, random_order=chain_rule)
    expected, found = trainer.eval_loss(unpacked(), options), trainer.eval_loss(packed(), options)
    assert [row.row_id for row in found.rows] == list(range(100, 112))
    assert found == expected


def test_a_segment_depends_on_no_other() -> None:
    """Without segments a row attends to all of its documents, so that one changes the loss of another."""
    trainer, options = make({}, threads=1), EvalOptions(tuple(range(12)), 2)
    full = packed()
    batch = Batch(full.ids, full.rows, full.columns, full.lengths, segment_ids=full.segment_ids)
    sizes = batch.segments()[1]
    other = batch.ids.copy()
    before = int(sum(sizes[:3]))
    other[before] = (other[before] + 1) % 15  # the fourth document's only token
    changed = Batch(other, batch.rows, batch.columns, batch.lengths, segment_ids=batch.segment_ids)
    one, two = (trainer.eval_loss(each, options).rows for each in (batch, changed))
    assert [a for a in one if a.row_id != 3] == [b for b in two if b.row_id != 3]
    assert one[3] != two[3]
    whole = [Batch(each.ids, each.rows, each.columns, each.lengths) for each in (batch, changed)]
    one, two = (trainer.eval_loss(each, EvalOptions(tuple(range(batch.rows)), 2)).rows for each in whole)
    assert one != two


def test_the_parts_of_packed_rows_hold_what_the_segments_hold() -> None:
    for batch in (packed(), Batch(np.arange(24).reshape(2, 12) % 15, 2, 12, segment_ids=numbered())):
        tensors = TensorBatch.of(batch, None)
        assert sum(tensors.lengths) == batch.tokens
        assert len(tensors.lengths) == batch.sequences == tensors.maskable_s.numel()
        flat = []
        for row, length in enumerate(tensors.lengths):
            ids, valid, maskable = tensors.take([row], length + 1)
            assert valid.tolist() == [[True] * length + [False]]
            assert int(maskable.sum()) == tensors.maskable_s[row]
            flat += ids[0, :length].tolist()
        assert flat == batch.ids.ravel().tolist()


def numbered() -> np.ndarray:
    return np.array([0] * 3 + [1] * 9 + [1] * 4 + [5] * 8, dtype=np.int32)


def test_earlier_numerics_divided_batches_in_their_order() -> None:
    """A step that was trained by version 2 is computed again with its parts, to the bit."""
    seen = []
    for version in (2, numerics.NUMERICS_VERSION):
        trainer = make({}, micro_batch_tokens=24, threads=1)
        trainer.configure(trainer._optimizer.model_dump(), version)
        shapes: list[tuple[int, ...]] = []
        forward = trainer.networks.generator.forward

        def noting(ids: torch.Tensor, *rest: Any, forward: Any = forward, shapes: Any = shapes) -> Any:
            shapes.append(tuple(ids.shape))
            return forward(ids, *rest)

        trainer.networks.generator.forward = noting  # type: ignore[method-assign]
        trainer.train_step(1, 1, unpacked(), Modes())
        seen.append(shapes)
    assert seen[0][0] == (2, 7), "the first rows"
    assert seen[1][0] == (2, 12), "the longest first"
    assert seen[0] != seen[1]
