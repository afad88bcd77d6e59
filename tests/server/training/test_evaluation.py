"""The evaluation is unbiased, estimates its error, and does not depend on how rows are batched."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import pairs_oracle
from test_known_answers import evaluate
from test_trainer import IDS, make

from bench.sources import pairs
from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.results import EvalOptions
from maskwire_server.training import chain_rule as chain
from maskwire_server.training import corruption, evaluation, objective


def exact_nelbo(n: int, cost: dict[tuple[int, ...], float]) -> float:
    """Sum over k of (1/k) times the mean cost of the masks of k positions: nats, by enumeration."""
    total = 0.0
    for k in range(1, n + 1):
        masks = [mask for mask in cost if len(mask) == k]
        total += sum(cost[mask] for mask in masks) / len(masks) / k
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("draws", [1, 2, 3, 4, 7])
def test_the_systematic_estimator_equals_enumeration_on_average(n: int, draws: int) -> None:
    # A made-up model: the cross-entropy of a mask is a random function of the whole mask.
    generator = np.random.default_rng(n)
    cost = {
        mask: float(generator.gamma(2.0) * k)
        for k in range(1, n + 1)
        for mask in itertools.combinations(range(n), k)
    }
    mean_of_k = {k: sum(cost[m] for m in cost if len(m) == k) / math.comb(n, k) for k in range(1, n + 1)}
    # Counts are constant between the offsets at which some n (j + u)/K is an integer.
    edges = sorted(
        {
            0.0,
            1.0,
            *(k * draws / n - j for j in range(draws) for k in range(n + 1) if 0 < k * draws / n - j < 1),
        }
    )
    average = 0.0
    for low, high in itertools.pairwise(edges):
        u = torch.tensor([(low + high) / 2], dtype=torch.float64)
        counts = evaluation.systematic_counts(torch.tensor([n]), u, draws)[0].tolist()
        average += (high - low) * sum(n / k * mean_of_k[k] for k in counts) / draws
    assert average == pytest.approx(exact_nelbo(n, cost), rel=1e-10)


def test_the_counts_depend_only_on_the_seed_and_the_row() -> None:
    n = torch.tensor([9, 9, 9])
    counts = evaluation.draw_counts(n, [4, 8, 4], seed=1, count=5)
    assert counts.shape == (3, 5)
    assert torch.equal(counts[0], counts[2])
    assert torch.equal(evaluation.draw_counts(n[:1], [8], 1, 5)[0], counts[1])
    assert not torch.equal(evaluation.draw_counts(n, [4, 8, 4], 2, 5), counts)


def test_batching_shuffling_and_padding_change_no_row() -> None:
    trainer = make({"critic": "token", "self_cond": True})
    for step in range(1, 4):
        trainer.train_step(1, step, Batch(IDS, 6, 12), Modes())
    lengths = np.array([12, 5, 9, 12, 2, 7], dtype=np.int32)
    rows = [IDS[i, : lengths[i]] for i in range(6)]

    def run(order: list[int]) -> dict[int, tuple[float, int]]:
        sizes = np.array([lengths[i] for i in order], dtype=np.int32)
        batch = Batch(np.concatenate([rows[i] for i in order]), len(order), int(sizes.max()), sizes)
        found = trainer.eval_loss(batch, EvalOptions(tuple(order), draws=6, seed=9))
        return {row.row_id: (row.nats, row.tokens) for row in found.rows}

    whole = run([0, 1, 2, 3, 4, 5])
    apart = run([5, 1, 3]) | run([4]) | run([2, 0])
    for row, (nats, tokens) in whole.items():
        assert apart[row][0] == pytest.approx(nats, rel=1e-5)
        assert apart[row][1] == tokens


def test_the_monte_carlo_error_is_the_spread_over_seeds() -> None:
    ids = pairs(np.random.default_rng(0), 64, 6, 4)
    found = [evaluate(pairs_oracle(4), ObjectiveConfig(), ids, 4, 4, seed) for seed in range(150)]
    spread = np.std([result.nats_per_token for result in found], ddof=1)
    errors = [result.monte_carlo_error for result in found]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.2)
    assert evaluate(pairs_oracle(4), ObjectiveConfig(), ids, 4, 1).monte_carlo_error is None
    assert evaluate(pairs_oracle(4), ObjectiveConfig(), ids[:1], 4, 4).standard_error is None


@pytest.mark.parametrize("settings", [
    {"schedule": "cosine", "weighting": "masked_mean", "critic": "token"},
    {"schedule": "linear", "masking": "bernoulli", "weighting": "masked_mean"},
    {"schedule": "quadratic", "critic": "self"},
], ids=str)  # fmt: skip
def test_the_losses_equal_those_of_training_without_augmentation(settings: dict[str, object]) -> None:
    trainer = make(settings, {"learning_rate": 1e-2, "warmup_steps": 0})
    for step in range(1, 30):
        trainer.train_step(1, step, Batch(IDS, 6, 12), Modes())
    many = Batch(np.tile(IDS, (20, 1)), 120, 12)
    trained = [trainer.train_step(1, 1000 + step, many, Modes(learning_rate=0.0)) for step in range(40)]
    found = trainer.eval_loss(many, EvalOptions(tuple(range(120)), 16))
    generator = [result.losses.generator_loss for result in trained]
    error = np.std(generator) / math.sqrt(len(generator))
    assert found.losses.generator_loss == pytest.approx(np.mean(generator), abs=4 * error + 0.01)
    if "critic" in settings:
        critic = [result.losses.critic_loss for result in trained]
        error = np.std(critic) / math.sqrt(len(critic))
        assert found.losses.critic_loss == pytest.approx(np.mean(critic), abs=4 * error + 0.01)


def test_modes_choose_the_losses_and_nothing_else() -> None:
    trainer = make({"critic": "self"})
    batch, rows = Batch(IDS, 6, 12), tuple(range(6))
    both = trainer.eval_loss(batch, EvalOptions(rows, 4))
    generator = trainer.eval_loss(batch, EvalOptions(rows, 4, only_train_generator=True))
    critic = trainer.eval_loss(batch, EvalOptions(rows, 4, only_train_critic=True))
    assert both.nats_per_token == generator.nats_per_token == critic.nats_per_token
    assert (generator.losses.critic_loss, generator.critic_accuracy) == (None, None)
    assert (critic.losses.generator_loss, critic.losses.loss) == (None, both.losses.critic_loss)


def test_the_results_by_masked_fraction_add_up() -> None:
    found = make().eval_loss(Batch(IDS, 6, 12), EvalOptions(tuple(range(6)), 8, text_bytes=144))
    parts = found.by_masked_fraction
    assert [part.low for part in parts] == pytest.approx([i / 10 for i in range(10)])
    masked = sum(part.masked_tokens for part in parts)
    right = sum((part.accuracy or 0) * part.masked_tokens for part in parts)
    assert right / masked == pytest.approx(found.accuracy)
    assert found.bits_per_byte == pytest.approx(found.bits_per_token / 2)
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_samples_have_the_probabilities_of_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]]).expand(40_000, 4)
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(objective.sample(logits, u, temperature), minlength=4) / 40_000
    expected = (
        torch.tensor([0.0, 0.0, 0.0, 1.0]) if temperature == 0 else (logits[0] / temperature).softmax(-1)
    )
    assert torch.allclose(counts, expected, atol=0.01)
    edge = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert objective.sample(logits[:2], edge, 1.0).tolist() == [0, 3]
    assert objective.sample(logits[:2] * 1e6, edge, 1e-9).tolist() == [3, 3]


@pytest.mark.parametrize("chain_rule", [False, True])
@pytest.mark.parametrize("longest", [0, 11])
def test_short_rows_in_a_batch_with_a_long_one_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, chain_rule: bool, longest: int
) -> None:
    columns, budget = 12, 24
    trainer = make({"critic": "none"})
    monkeypatch.setattr(trainer, "_budget", budget)
    taken = []
    random_ranks = corruption.random_ranks

    def noting(keys_b: torch.Tensor, maskable_bn: torch.Tensor) -> torch.Tensor:
        taken.append(maskable_bn.numel())
        return random_ranks(keys_b, maskable_bn)

    monkeypatch.setattr(corruption, "random_ranks", noting)
    monkeypatch.setattr(chain, "random_ranks", noting)
    lengths = np.ones(12, dtype=np.int32)
    lengths[longest] = columns
    ids = np.arange(int(lengths.sum())) % 9
    options = EvalOptions(tuple(range(12)), 8, chain_rule=chain_rule, random_order=chain_rule)
    found = trainer.eval_loss(Batch(ids, 12, columns, lengths), options)
    assert [row.tokens for row in found.rows] == lengths.tolist()
    assert max(taken) <= budget, "rows are as wide as the longest one among them"
