"""Data whose best loss can be computed by hand. An oracle and a trained model reach it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import Oracle, flip_chain_oracle, pairs_oracle
from whole_batch import corrupt, losses

from bench.sources import flip_chain, pairs
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.results import EvalOptions, EvalResult
from maskwire_server.training import evaluation, objective
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.trainer import TorchTrainer

SCHEDULES = ("linear", "cosine", "quadratic")


def training_losses(
    oracle: Oracle, settings: ObjectiveConfig, ids: np.ndarray, symbols: int, steps: int
) -> np.ndarray:
    """The generator's training loss by an oracle, one a step."""
    found = []
    every = torch.ones(ids.shape, dtype=torch.bool)
    vocabulary = Vocabulary(symbols + 1, symbols, None)
    for number in range(1, steps + 1):
        whole = corrupt(torch.from_numpy(ids), every, ~every, settings, vocabulary, StepKey(1, 1, number))
        sums = losses(oracle, settings, vocabulary, whole, ids.size)
        found.append(float(sums.generator))
    return np.array(found)


def evaluate(
    oracle: Oracle, settings: ObjectiveConfig, ids: np.ndarray, symbols: int, draws: int, seed: int = 0
) -> EvalResult:
    every = torch.ones(ids.shape, dtype=torch.bool)
    return evaluation.evaluate(
        oracle,
        settings,
        Vocabulary(symbols + 1, symbols, None),
        TensorBatch(torch.from_numpy(ids), every, ~every),
        EvalOptions(tuple(range(len(ids))), draws, seed),
        budget=2**16,
        smallest=2**11,
        device=torch.device("cpu"),
        has_critic=False,
        ema_weights=False,
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_the_training_loss_of_pairs_is_half_a_symbol_for_every_schedule(name: str, masking: str) -> None:
    # In a random order the first of each pair costs ln V and the second nothing: ln(V)/2 a token.
    settings = ObjectiveConfig(schedule=name, masking=masking)
    ids = pairs(np.random.default_rng(0), 256, 12, 4)
    losses = training_losses(pairs_oracle(4), settings, ids, 4, 60)
    error = losses.std(ddof=1) / math.sqrt(losses.size)
    assert abs(losses.mean() - math.log(4) / 2) < 4 * error
    assert error < 0.01


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        # Both of a pair masked has probability m^2, one or both m(2 - m)...: of the masked positions the
        # share whose twin is masked is E[m^2]/E[m]. Linear: (1/3)/(1/2) = 2/3; cosine: (1/2)/(2/pi).
        ("linear", 2 / 3),
        ("cosine", math.pi / 4),
    ],
)
def test_the_masked_mean_on_pairs_has_the_value_computed_by_hand(name: str, signature: float) -> None:
    settings = ObjectiveConfig(schedule=name, weighting="masked_mean")
    ids = pairs(np.random.default_rng(0), 512, 128, 4)
    losses = training_losses(pairs_oracle(4), settings, ids, 4, 12)
    assert losses.mean() == pytest.approx(signature * math.log(4), rel=0.01)


def test_the_evaluation_gives_the_entropy_of_the_flip_chain() -> None:
    # (ln 2 + 15 h(0.1)) / 16 with h(0.1) = -0.1 ln 0.1 - 0.9 ln 0.9 = 0.325083.
    best = (math.log(2) + 15 * -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))) / 16
    assert best == pytest.approx(0.348087, abs=1e-6)
    ids = flip_chain(np.random.default_rng(3), 400)
    found = evaluate(flip_chain_oracle(), ObjectiveConfig(), ids, 2, 8)
    assert found.standard_error is not None
    assert abs(found.nats_per_token - best) < 3 * found.standard_error
    assert found.standard_error < 0.01
    assert found.bits_per_token == pytest.approx(found.nats_per_token / math.log(2))


def test_the_critic_of_one_pair_has_the_known_best_loss() -> None:
    """One pair, V = 4, oracle samples at temperature 1, linear, exact count: best BCE 0.475069.

    k is 1 or 2, each with probability 1/2. k = 1: the sample is right, x̂ shows an equal pair, labels 0, 0.
    k = 2: both positions are sampled independently, x̂ = (a, b) uniform; each is wrong with probability 3/4.
    An unequal x̂ (probability 1/2 · 3/4 = 3/8) comes from k = 2 alone: a label is 1 with probability 3/4,
    h(3/4) = 0.562335. An equal one (1/2 + 1/8 = 5/8) is k = 2 with probability 1/5: 1/5 · 3/4 = 3/20,
    h(3/20) = 0.422709. Together 3/8 · 0.562335 + 5/8 · 0.422709 = 0.475069.
    """

    def h(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert 3 / 8 * h(3 / 4) + 5 / 8 * h(3 / 20) == pytest.approx(0.475069, abs=1e-6)
    oracle = pairs_oracle(4)
    right = {True: math.log(3 / 17), False: math.log(3)}  # logits of 3/20 and 3/4

    def criticize(ids_bn: torch.Tensor, valid_bn: object, *, train_trunk: bool) -> torch.Tensor:
        equal = ids_bn[:, 0] == ids_bn[:, 1]
        return torch.where(equal[:, None], right[True], right[False]).expand(-1, 2).double()

    oracle.criticize = criticize  # type: ignore[method-assign]
    settings = ObjectiveConfig(critic="self")
    vocabulary = Vocabulary(5, 4, None)
    ids = torch.from_numpy(pairs(np.random.default_rng(0), 4096, 2, 4))
    every = torch.ones(ids.shape, dtype=torch.bool)
    found = []
    for number in range(1, 11):
        whole = corrupt(ids, every, ~every, settings, vocabulary, StepKey(1, 1, number))
        keys_b = torch.arange(len(ids)) * 7919 + number
        plan = objective.StepPlan(critic=True)
        sums = losses(oracle, settings, vocabulary, whole, ids.numel(), plan, keys_b)
        assert sums.critic is not None
        found.append(float(sums.critic))
    assert np.mean(found) == pytest.approx(0.475069, abs=4 * np.std(found) / math.sqrt(len(found)) + 1e-4)
    assert np.std(found) < 0.01


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 150),
        ({"schedule": "quadratic", "masking": "bernoulli"}, 150),
        ({"preset": "x-transformers"}, 300),  # its augmentation makes it learn more slowly
        ({"self_cond": True, "critic": "token"}, 150),
    ],
    ids=str,
)
def test_a_trained_model_comes_within_three_percent_on_pairs(settings: dict[str, object], steps: int) -> None:
    whole = config.load(
        None,
        model={
            "num_tokens": 9,
            "mask_id": 8,
            "max_seq_len": 8,
            "dim": 64,
            "depth": 2,
            "heads": 2,
            "dim_head": 32,
        },
        objective=settings,
        optimizer={"learning_rate": 5e-3, "warmup_steps": 20, "ema_decay": 0.98},
        serve={"threads": 1},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=0)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        trainer.train_step(1, step, Batch(pairs(rng, 64, 8, 8), 64, 8), Modes())
    found = trainer.eval_loss(Batch(pairs(rng, 512, 8, 8), 512, 8), EvalOptions(tuple(range(512)), 16))
    assert found.nats_per_token == pytest.approx(math.log(8) / 2, rel=0.03)


def test_the_oracle_sees_the_corrupted_batch() -> None:
    oracle = pairs_oracle(4)
    ids = torch.from_numpy(pairs(np.random.default_rng(0), 8, 6, 4))
    every = torch.ones(ids.shape, dtype=torch.bool)
    settings, vocabulary = ObjectiveConfig(), Vocabulary(5, 4, None)
    whole: Corruption = corrupt(ids, every, ~every, settings, vocabulary, StepKey(1, 1, 1))
    losses(oracle, settings, vocabulary, whole, 48)
    assert torch.equal(oracle.seen[0] == 4, whole.mask_bn)
    assert torch.equal(oracle.seen[0][~whole.mask_bn], ids[~whole.mask_bn])
