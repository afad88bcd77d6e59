"""Steps that are prepared while the device computes the one before, and what makes a step wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_segments import packed, unpacked
from test_trainer import BATCH, IDS, make, state
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskwire_server.batch import Batch, Modes
from maskwire_server.training import objective
from maskwire_server.training.batch_losses import BatchLosses
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.step_gradients import PreparedStep
from maskwire_server.training.trainer import TorchTrainer

RAGGED = Batch(IDS[:3, :7].flatten()[:15], 3, 7, np.array([7, 3, 5], dtype=np.int32))
CRITIC = {"critic": "self", "self_cond": True, "self_cond_prob": 1.0}
CASES: dict[str, tuple[dict[str, Any], Batch, Modes]] = {
    "exact": ({}, BATCH, Modes()),
    "ragged": ({"schedule": "cosine"}, RAGGED, Modes()),
    "packed": (CRITIC, packed(), Modes()),
    "bernoulli": ({"masking": "bernoulli", "critic": "token"}, BATCH, Modes()),
    "only the critic": (CRITIC, RAGGED, Modes(only_train_critic=True, generator_sample_temperature=0.5)),
    "augmented": ({"augment_prob": 1.0, "random_token_prob": 0.4, "no_replace_prob": 0.3}, BATCH, Modes()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_was_prepared_ahead_gives_the_same_bits(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch, modes = CASES[case]
    ahead, alone = make(objective, threads=1), make(objective, threads=1)
    computed: list[PreparedStep] = []
    gradients = ahead._gradients

    def noting(step: PreparedStep) -> BatchLosses:
        computed.append(step)
        return gradients(step)

    monkeypatch.setattr(ahead, "_gradients", noting)
    for step in (1, 2, 3):
        ahead.prepare_step(1, step, batch, modes)
        assert ahead._next._kept is not None
        prepared = ahead._next._kept[2]
        found = ahead.train_step(1, step, batch, modes)
        assert computed[-1] is prepared, "the work is not done twice"
        assert found == alone.train_step(1, step, batch, modes)
        assert np.isfinite(found.losses.loss)
    assert all(torch.equal(tensor, state(alone)[name]) for name, tensor in state(ahead).items())


@pytest.mark.parametrize("case", CASES)
def test_the_host_knows_how_many_positions_each_part_masks(case: str) -> None:
    objective, batch, modes = CASES[case]
    trainer = make(objective, model={"max_seq_len": 64}, micro_batch_tokens=24, threads=1)
    for number in range(1, 6):
        step = trainer._prepared(trainer._host(batch), modes, StepKey(0, 1, number))
        parts = [part for part in step.parts if part is not None]
        assert len(parts) > 1 or batch is RAGGED
        for part in parts:
            assert torch.equal(part.masked_m, part.rows.mask_bn.flatten().nonzero()[:, 0])
            assert part.maskable_p is None or len(part.maskable_p) == int(part.rows.maskable_bn.sum())
        assert step.masked == sum(len(part.masked_m) for part in parts)


@pytest.mark.parametrize(
    "other",
    [
        (2, 2, BATCH, Modes()),
        (1, 3, BATCH, Modes()),
        (1, 2, Batch(IDS[::-1].copy(), 6, 12), Modes()),
        (1, 2, BATCH, Modes(learning_rate=0.5)),
        (1, 2, BATCH, Modes(only_train_critic=True)),
    ],
    ids=["lineage", "step", "batch", "learning rate", "mode"],
)
def test_a_prepared_step_is_not_used_for_another_step(other: tuple[int, int, Batch, Modes]) -> None:
    trainer, alone = make({"critic": "self"}, threads=1), make({"critic": "self"}, threads=1)
    trainer.prepare_step(*other)
    assert trainer.train_step(1, 2, BATCH, Modes()) == alone.train_step(1, 2, BATCH, Modes())
    assert all(torch.equal(tensor, state(alone)[name]) for name, tensor in state(trainer).items())
    assert trainer._next.take(other[2], other[3], StepKey(0, other[0], other[1])) is None, "it is discarded"


def test_nothing_is_prepared_ahead_on_a_cpu() -> None:
    """There the step is computed by then, and its answer would only come later."""
    called = []
    make(threads=1).train_step(1, 1, BATCH, Modes(), lambda: called.append(1))
    assert called == []


class Waits(TorchDispatchMode):
    """Notes operations that read from the device, or that make tensors from numbers of the host."""

    READS = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal", "bincount",
             "_unique", "_unique2", "unique_consecutive", "repeat_interleave")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in (*self.READS, "lift_fresh", "lift_fresh_copy") or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Notes calls that copy between host and device. On a CPU they copy nothing, and are not dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = (*args, *(kwargs or {}).values())
        to_device = name == "to" and any(isinstance(each, torch.device | str) for each in given)
        if to_device or name in ("cpu", "cuda", "tolist", "numpy", "item"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits(trainer: TorchTrainer, batch: Batch, modes: Modes) -> list[str]:
    """What makes the gradients of a step wait for the device, on a GPU."""
    step = trainer._prepared(trainer._host(batch), modes, StepKey(0, 1, 2))
    with Copies() as copies, Waits() as others:
        trainer._gradients(step)
    trainer._clear_gradients()
    return copies.found + others.found


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_computed_without_waiting_for_the_device(case: str) -> None:
    objective, batch, modes = CASES[case]
    trainer = make(objective, model={"max_seq_len": 64}, micro_batch_tokens=24, threads=1)
    trainer.train_step(1, 1, batch, modes)
    assert waits(trainer, batch, modes) == []


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "float": lambda ids: float(ids.sum()),
    "bool": lambda ids: bool((ids > 0).any()),
    "item": lambda ids: ids.max().item(),
    "tolist": lambda ids: ids.tolist(),
    "numpy": lambda ids: ids.numpy(),
    "cpu": lambda ids: ids.cpu(),
    "to": lambda ids: ids.to(torch.device("cpu")),
    "mask": lambda ids: ids[ids > 3],
    "nonzero": lambda ids: ids.nonzero(),
    "unique": torch.unique,
    "repeats": lambda ids: torch.repeat_interleave(ids.flatten(), ids.flatten()),
    "new tensor": lambda ids: torch.tensor([1, 2], device=ids.device),
}


@pytest.mark.parametrize("how", WAITS)
def test_a_wait_for_the_device_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(threads=1)
    embed = trainer.networks.embed

    def waiting(ids_bn: torch.Tensor, *others: Any) -> torch.Tensor:
        WAITS[how](ids_bn)
        return embed(ids_bn, *others)

    monkeypatch.setattr(trainer.networks, "embed", waiting)
    assert waits(trainer, unpacked(), Modes())


def test_positions_beyond_those_of_a_mask_are_an_error() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert objective.positions(mask, 2).tolist() == objective.positions(mask).tolist() == [0, 3]
    with pytest.raises(IndexError):
        mask.flatten()[objective.positions(mask, 3)]
