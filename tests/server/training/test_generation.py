"""Generation by the trainer: special ids, prompts, seeds, batches, weights, and a known source."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from reference_sampler import prompts_of

from bench.sources import pairs
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.results import GenerateOptions, Order, SelfCondMode
from maskwire_server.training import sampling
from maskwire_server.training.trainer import TorchTrainer


def trainer(**sections: dict[str, Any]) -> TorchTrainer:
    model = {
        "num_tokens": 9, "mask_id": 4, "pad_id": 0, "max_seq_len": 12, "dim": 32, "depth": 2, "heads": 2,
        "dim_head": 16,
    }  # fmt: skip
    whole = config.load(None, **{"model": model, "serve": {"threads": 1}, **sections})
    return TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)


EVERY = [
    GenerateOptions((), order=order, remasking=remasking, self_cond_mode=mode, temperature=temperature,
                    top_k=top_k, top_p=top_p, steps=steps, choice_temperature=noise)
    for order, remasking, mode, (temperature, top_k, top_p), (steps, noise) in itertools.product(
        Order, (False, True), SelfCondMode, ((1.0, 0, 1.0), (0.0, 0, 1.0), (3.0, 4, 0.9)),
        ((0, 0.0), (4, 2.0)),
    )
    if not remasking or order in (Order.CONFIDENCE, Order.CRITIC)
] + [
    GenerateOptions((), order=order, start_temperature=2.0, top_k=6, top_p=0.9, steps=steps)
    for order in (Order.RANDOM, Order.CONFIDENCE) for steps in (0, 4)
]  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> TorchTrainer:
    return trainer(objective={"self_cond": True, "critic": "self"})


def test_no_setting_generates_special_ids_or_changes_a_prompt(whole: TorchTrainer) -> None:
    prompts = prompts_of(
        [[None] * 7, [1, None, None, 2, None], [None, 3], [7, 7, 7], [None, 8, None, None, None, 1, None]]
    )
    for options in EVERY:
        options = dataclasses.replace(options, row_seeds=(3, 1, 4, 1, 5))
        states = list(whole.generate(prompts, options))
        assert len(states) == (options.steps or 7)
        last = states[-1]
        assert last.done
        assert last.ids.dtype == np.uint8
        assert not np.isin(last.ids[prompts.valid], [0, 4]).any()
        assert (last.ids[prompts.known] == prompts.ids[prompts.known]).all()
        assert (last.ids[~prompts.valid] == 0).all()


def test_a_row_does_not_depend_on_other_rows_or_on_how_the_batch_is_split(whole: TorchTrainer) -> None:
    prompts = prompts_of([[1, *[None] * 5], [None] * 6, [None, 2, *[None] * 3, 3]])
    for options in EVERY[::5]:  # a fifth of the combinations, with each value of each option
        options = dataclasses.replace(options, row_seeds=(30, 31, 32))
        together = [state.ids for state in whole.generate(prompts, options)]
        again = [state.ids for state in whole.generate(prompts, options)]
        assert all((a == b).all() for a, b in zip(together, again, strict=True))
        for row in (0, 2):
            part = slice(row, row + 1)
            alone = Prompts(prompts.ids[part], prompts.valid[part], prompts.known[part])
            *_, last = whole.generate(alone, dataclasses.replace(options, row_seeds=(30 + row,)))
            assert (last.ids[0] == together[-1][row]).all(), options
        whole._budget, budget = 6, whole._budget  # one row
        *_, last = whole.generate(prompts, options)
        whole._budget = budget
        assert (last.ids == together[-1]).all(), options


def test_carried_embeddings_stay_within_the_budget(
    whole: TorchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerateOptions(tuple(range(10)), self_cond_mode=SelfCondMode.CARRY, steps=5)
    *_, expected = whole.generate(Prompts.nothing(10, 12), options)
    kept = []
    put = sampling.Rows.put

    def noting(rows: sampling.Rows, which_b: torch.Tensor, part: sampling.Rows) -> sampling.Rows:
        found = put(rows, which_b, part)
        assert found.carried_bnd is not None
        kept.append(found.carried_bnd.shape[0] * found.carried_bnd.shape[1])
        return found

    monkeypatch.setattr(sampling.Rows, "put", noting)
    monkeypatch.setattr(whole, "_budget", 36)
    states = list(whole.generate(Prompts.nothing(10, 12), options))
    assert max(kept) == 36
    assert (states[-1].ids == expected.ids).all()
    assert [state.done for state in states] == [False] * 19 + [True]
    assert [state.unmasking_step for state in states] == [1, 2, 3, 4, 5] * 4
    for state in states:
        assert (state.ids == 4).sum(1).tolist() == list(state.still_masked)


def test_each_row_has_its_own_seed(whole: TorchTrainer) -> None:
    options = GenerateOptions((5, 6, 5, 2**63 - 1, -(2**63)))
    *_, last = whole.generate(Prompts.nothing(5, 12), options)
    assert (last.ids[0] == last.ids[2]).all()
    assert len({tuple(row) for row in last.ids.tolist()}) == 4


def test_sampling_changes_nothing_and_can_stop_between_two_passes(whole: TorchTrainer) -> None:
    ids = np.random.default_rng(0).integers(5, 9, (4, 12))
    before = {name: weight.clone() for name, weight in whole.networks.state_dict().items()}
    states = whole.generate(Prompts.nothing(4, 12), GenerateOptions((1, 2, 3, 4)))
    next(states)
    assert whole.networks.training
    assert torch.is_grad_enabled()
    states.close()
    assert all(weight.equal(before[name]) for name, weight in whole.networks.state_dict().items())
    again, alone = trainer(), trainer()
    list(again.generate(Prompts.nothing(4, 12), GenerateOptions((1, 2, 3, 4))))
    assert again.train_step(1, 1, Batch(ids, 4, 12), Modes()) == alone.train_step(
        1, 1, Batch(ids, 4, 12), Modes()
    )


def test_the_moving_average_is_sampled_if_the_run_keeps_one() -> None:
    kept = trainer(optimizer={"ema_decay": 0.9999, "learning_rate": 0.1})
    ids = np.random.default_rng(0).integers(5, 9, (8, 12))
    for step in range(1, 20):
        kept.train_step(1, step, Batch(ids, 8, 12), Modes())
    options = GenerateOptions(tuple(range(8)))
    *_, averaged = kept.generate(Prompts.nothing(8, 12), options)
    *_, raw = kept.generate(Prompts.nothing(8, 12), dataclasses.replace(options, raw_weights=True))
    assert (averaged.ema_weights, raw.ema_weights) == (True, False)
    assert (averaged.ids != raw.ids).any()


def test_a_critic_order_needs_a_critic() -> None:
    with pytest.raises(ValueError, match="critic"):
        list(trainer().generate(Prompts.nothing(1, 4), GenerateOptions((1,), order=Order.CRITIC)))


def test_a_trained_model_makes_pairs_and_fills_them_in() -> None:
    symbols, n = 4, 12
    made = trainer(
        model={"num_tokens": 5, "mask_id": 4, "max_seq_len": n, "dim": 64, "depth": 2, "heads": 2,
               "dim_head": 32},
        optimizer={"learning_rate": 6e-3, "warmup_steps": 20},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for step in range(1, 201):
        made.train_step(1, step, Batch(pairs(rng, 32, n, symbols), 32, n), Modes())
    options = GenerateOptions(tuple(range(256)), order=Order.CONFIDENCE)
    *_, last = made.generate(Prompts.nothing(256, n), options)
    assert (last.ids[:, ::2] == last.ids[:, 1::2]).mean() >= 0.99
    ids = pairs(rng, 256, n, symbols)
    known = np.zeros(ids.shape, dtype=bool)
    known[:, ::2] = True  # one of each pair is given, the other follows
    prompts = Prompts(np.where(known, ids, 0), np.ones_like(known), known)
    *_, filled = made.generate(prompts, dataclasses.replace(options, order=Order.RANDOM))
    assert (filled.ids[known] == ids[known]).all()
    assert (filled.ids == ids).mean() >= 0.99
