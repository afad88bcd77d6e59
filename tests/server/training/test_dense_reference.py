"""The evaluation agrees with code that enumerates every mask, offset and order of short rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import dense
import numpy as np
import pytest
import torch
from oracles import Oracle, flip_chain_oracle, pairs_oracle

from bench.sources import flip_chain, pairs
from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.results import EvalOptions, EvalResult
from maskwire_server.training import chain_rule, evaluation, evaluation_figures
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.tensor_batch import TensorBatch

SYMBOLS, MASK_ID = 4, 4
VOCABULARY = Vocabulary(SYMBOLS + 1, MASK_ID, None)
OPTIONS = {
    "kv_heads": 1, "positions": "rotary", "rotary_dim": 2, "rotary_pairs": "interleaved", "norm": "rmsnorm",
    "feed_forward": "geglu", "ff_bias": False, "qk_norm": True, "qk_norm_gain": "per_head",
}  # fmt: skip
"""Options of the encoder that are not the default, all together."""
CPU = torch.device("cpu")


def network(**settings: Any) -> tuple[Networks, ObjectiveConfig]:
    """A random tiny network in fp64: its conditionals fit no distribution."""
    shape = settings.pop("model", {})
    model = ModelConfig(
        num_tokens=5, mask_id=MASK_ID, max_seq_len=8, dim=8, depth=2, heads=2, dim_head=4, **shape
    )
    objective = ObjectiveConfig(**settings)
    torch.manual_seed(3)
    networks = Networks(model, objective).double().eval()
    with torch.no_grad():
        for weight in networks.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return networks, objective


def batch_of(rows: torch.Tensor, prompt: torch.Tensor | None = None) -> TensorBatch:
    every = torch.ones(rows.shape, dtype=torch.bool)
    return TensorBatch(rows, every, ~every if prompt is None else prompt)


def evaluate(networks: Any, objective: ObjectiveConfig, batch: TensorBatch, **options: Any) -> EvalResult:
    settings = EvalOptions(options.pop("row_ids", tuple(range(len(batch.ids_rn)))), **options)
    with torch.no_grad():
        if settings.chain_rule:
            return chain_rule.evaluate(
                networks, objective, VOCABULARY, batch, settings, budget=64, device=CPU, ema_weights=False
            )
        return evaluation.evaluate(
            networks, objective, VOCABULARY, batch, settings,
            budget=640, smallest=64, device=CPU, has_critic=objective.critic != "none", ema_weights=False,
        )  # fmt: skip


@pytest.fixture
def every_mask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the evaluation take each mask of a row once, in place of drawing masks."""

    def arrange(n: int) -> list[dense.Mask]:
        found = list(dense.masks(range(n)))
        grid = torch.zeros(len(found), n, dtype=torch.bool)
        for row, mask in enumerate(found):
            grid[row, list(mask)] = True
        taken = iter(grid)

        def mask_exactly(keys_b: torch.Tensor, maskable_bn: torch.Tensor, k_b: torch.Tensor) -> torch.Tensor:
            rows = torch.stack([next(taken) for _ in keys_b])
            assert torch.equal(rows.sum(-1), k_b)
            return rows

        monkeypatch.setattr(evaluation, "mask_exactly", mask_exactly)
        monkeypatch.setattr(evaluation, "draw_counts", lambda *_: grid.sum(-1, keepdim=True))
        return found

    return arrange


def offsets(n: int, draws: int) -> list[tuple[float, float]]:
    """The offsets in [0, 1), as intervals (width, a point inside) within which no count changes."""
    edges = {0.0, 1.0}
    for j in range(draws):
        for k in range(1, n):
            edge = k * draws / n - j
            edges |= {edge} if 0 < edge < 1 else set()
    return [(high - low, (low + high) / 2) for low, high in itertools.pairwise(sorted(edges))]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "settings", [{}, {"self_cond": True}, {"schedule": "cosine"}, {"model": OPTIONS}], ids=str
)
def test_the_mean_over_all_offsets_and_masks_equals_enumeration(
    n: int, settings: dict[str, Any], every_mask: Any
) -> None:
    networks, objective = network(**settings)
    ids = torch.randint(0, SYMBOLS, (n,), generator=torch.Generator().manual_seed(n))
    exact = dense.nelbo(dense.predict_with(networks, objective, MASK_ID), ids, MASK_ID)
    masks = every_mask(n)
    found = evaluate(networks, objective, batch_of(ids.expand(len(masks), n)), draws=1)
    by_count = {
        k: np.mean([row.nats for row, mask in zip(found.rows, masks, strict=True) if len(mask) == k])
        for k in range(1, n + 1)
    }
    for draws in (1, 2, 3, 4, 5, 7, 16):
        average = 0.0
        for width, u in offsets(n, draws):
            where = torch.tensor([u], dtype=torch.float64)
            counts = evaluation.systematic_counts(torch.tensor([n]), where, draws)[0].tolist()
            average += width * sum(by_count[k] for k in counts) / draws
        assert average == pytest.approx(exact, rel=1e-10), draws


@pytest.mark.parametrize("labels", ["mismatch", "token_critic"])
@pytest.mark.parametrize("critic", ["self", "token"])
def test_the_critics_loss_and_accuracy_equal_enumeration(critic: str, labels: str, every_mask: Any) -> None:
    n = 4
    networks, objective = network(critic=critic, critic_labels=labels)
    ids = torch.tensor([0, 3, 1, 1])
    masks = every_mask(n)
    rows = batch_of(ids.expand(len(masks), n))
    found = evaluate(networks, objective, rows, draws=1, generator_sample_temperature=0.0)
    predict = dense.predict_with(networks, objective, MASK_ID)
    losses, right = [], []
    for mask in masks:
        best = predict(dense.masked(ids, mask, MASK_ID)).argmax(-1)
        filled = torch.tensor([best[i] if i in mask else ids[i] for i in range(n)])
        scores = networks.criticize(filled[None], None, train_trunk=False)[0].tolist()
        for i in range(n):
            wrong = i in mask if labels == "token_critic" else bool(filled[i] != ids[i])
            p = 1 / (1 + math.exp(-scores[i]))
            losses.append(-math.log(p if wrong else 1 - p))
            right.append((p > 0.5) == wrong)
    # The linear schedule masks each count equally often, as the draws do: no draw counts for more.
    assert found.losses.critic_loss == pytest.approx(np.mean(losses), rel=1e-10)
    assert found.critic_accuracy == pytest.approx(np.mean(right))


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_estimator_is_unbiased_at_odd_short_lengths(n: int, draws: int) -> None:
    networks, objective = network()
    ids = torch.randint(0, SYMBOLS, (n,), generator=torch.Generator().manual_seed(n))
    exact = dense.nelbo(dense.predict_with(networks, objective, MASK_ID), ids, MASK_ID)
    found = evaluate(networks, objective, batch_of(ids.expand(4000, n)), draws=draws, seed=1)
    nats = np.array([row.nats for row in found.rows])
    assert abs(nats.mean() - exact) < 4 * nats.std(ddof=1) / math.sqrt(nats.size) + 1e-9


def test_prompts_are_visible_and_not_part_of_the_loss() -> None:
    networks, objective = network()
    ids = torch.tensor([[0, 3, 1, 1, 2], [2, 2, 0, 3, 1]])
    prompt = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    predict = dense.predict_with(networks, objective, MASK_ID)
    for row in range(2):
        positions = [i for i in range(5) if not prompt[row, i]]
        exact = dense.nelbo(predict, ids[row], MASK_ID, positions)
        some = batch_of(ids[row].expand(3000, 5), prompt[row].expand(3000, 5))
        nats = np.array([r.nats for r in evaluate(networks, objective, some, draws=4).rows])
        assert abs(nats.mean() - exact) < 4 * nats.std(ddof=1) / math.sqrt(nats.size)
    found = evaluate(networks, objective, batch_of(ids, prompt), chain_rule=True, draws=1)
    for row, positions in enumerate(([1, 2, 4], [0, 1, 3, 4])):
        assert found.rows[row].nats == pytest.approx(
            dense.chain(predict, ids[row], MASK_ID, positions), rel=1e-10
        )


def test_the_chain_rule_is_the_product_of_its_passes() -> None:
    networks, objective = network(self_cond=True)
    ids = torch.randint(0, SYMBOLS, (3, 6), generator=torch.Generator().manual_seed(0))
    predict = dense.predict_with(networks, objective, MASK_ID)
    found = evaluate(networks, objective, batch_of(ids), chain_rule=True, draws=1)
    for row in range(3):
        assert found.rows[row].nats == pytest.approx(
            dense.chain(predict, ids[row], MASK_ID, range(6)), rel=1e-10
        )
    assert found.monte_carlo_error is None
    assert sum(part.masked_tokens for part in found.by_masked_fraction) == 18
    options = EvalOptions((7, 8, 9), draws=5, seed=2, chain_rule=True, random_order=True)
    found = evaluate(networks, objective, batch_of(ids), **vars(options))
    for row in range(3):
        which = torch.full((5,), row)
        orders = (
            chain_rule.ranks(batch_of(ids).maskable_rn[which], options, which, torch.arange(5))
            .argsort(-1)
            .tolist()
        )
        assert all(sorted(order) == list(range(6)) for order in orders)
        assert len({tuple(order) for order in orders}) > 1
        expected = [dense.chain(predict, ids[row], MASK_ID, order) for order in orders]
        assert found.rows[row].nats == pytest.approx(np.mean(expected), rel=1e-10)
        apart = 2 * math.sqrt(3 * 2) / 5 * (np.mean(expected[:3]) - np.mean(expected[3:]))
        assert found.rows[row].half_difference == pytest.approx(apart, rel=1e-9)


def test_the_mean_of_the_chain_rule_over_orders_is_the_negative_elbo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks, objective = network()
    ids = torch.tensor([[1, 3, 0, 0, 2]])
    orders = torch.tensor(list(itertools.permutations(range(5))))
    ranks = iter(orders.argsort(-1))
    monkeypatch.setattr(
        chain_rule, "random_ranks", lambda keys, _: torch.stack([next(ranks) for _ in range(len(keys))])
    )
    # One part: each order is asked for once.
    options = EvalOptions((0,), draws=120, chain_rule=True, random_order=True)
    with torch.no_grad():
        found = chain_rule.evaluate(
            networks,
            objective,
            VOCABULARY,
            batch_of(ids),
            options,
            budget=2**16,
            device=CPU,
            ema_weights=False,
        )
    predict = dense.predict_with(networks, objective, MASK_ID)
    assert found.rows[0].nats == pytest.approx(dense.nelbo(predict, ids[0], MASK_ID), rel=1e-10)
    by_order = [dense.chain(predict, ids[0], MASK_ID, order) for order in orders.tolist()]
    assert np.mean(by_order) == pytest.approx(found.rows[0].nats, rel=1e-10)
    assert np.std(by_order) > 0.1, "a network's conditionals are not those of one distribution"


def test_with_consistent_conditionals_every_order_gives_the_likelihood() -> None:
    # Binary symbols 0 and 1; the oracle's mask id is 2.
    oracle = flip_chain_oracle(0.1)
    ids = torch.from_numpy(flip_chain(np.random.default_rng(1), 5)[:, :6])
    vocabulary = Vocabulary(3, 2, None)
    flips = (ids[:, 1:] != ids[:, :-1]).sum(-1).tolist()
    for random_order in (False, True):
        options = EvalOptions(
            tuple(range(5)), 3 if random_order else 1, chain_rule=True, random_order=random_order
        )
        found = chain_rule.evaluate(
            oracle, ObjectiveConfig(), vocabulary, batch_of(ids), options,
            budget=64, device=CPU, ema_weights=False,
        )  # fmt: skip
        for row, count in zip(found.rows, flips, strict=True):
            likelihood = math.log(2) - (5 - count) * math.log(0.9) - count * math.log(0.1)
            assert row.nats == pytest.approx(likelihood, rel=1e-10)


def tabulated(oracle: Oracle, n: int, ids: int) -> Oracle:
    """The same oracle from a table of all its inputs, for many rows."""
    every = torch.tensor(list(itertools.product(range(ids), repeat=n)))
    table = oracle.log_probabilities(every, every == oracle.mask_id)
    place = ids ** torch.arange(n - 1, -1, -1)
    return Oracle(oracle.mask_id, lambda seen, _: table[(seen * place).sum(-1)])


@pytest.mark.parametrize("source", ["flip chain", "pairs of any length"])
def test_the_standard_error_covers_the_truth_in_93_to_97_percent(source: str) -> None:
    # 2,000 repetitions of 128 fresh rows: their own error, sqrt(.95 * .05 / 2,000), is half a percent.
    repetitions, rows, n = 2000, 128, 6
    rng = np.random.default_rng(5)
    total = repetitions * rows
    lengths = np.full(total, n)
    if source == "flip chain":
        ids = flip_chain(rng, total)[:, :n]
        truth = (math.log(2) + (n - 1) * -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))) / n
        oracle, vocabulary = tabulated(flip_chain_oracle(0.1), n, 3), Vocabulary(3, 2, None)
    else:
        ids, truth = pairs(rng, total, n, 3), math.log(3) / 2
        lengths = rng.choice([2, 4, 6], total)
        oracle, vocabulary = tabulated(pairs_oracle(3), n, 4), Vocabulary(4, 3, None)
    valid = torch.from_numpy(np.arange(n) < lengths[:, None])
    # Behind a row's end are prompts: given, and to these oracles of no help.
    batch = TensorBatch(torch.from_numpy(ids), torch.ones_like(valid), ~valid)
    found = evaluation.evaluate(
        oracle, ObjectiveConfig(), vocabulary, batch, EvalOptions(tuple(range(total)), 2, seed=4),
        budget=2**18, smallest=64, device=CPU, has_critic=False, ema_weights=False,
    )  # fmt: skip
    nats = torch.tensor([row.nats for row in found.rows], dtype=torch.float64).view(repetitions, rows)
    n_r = torch.from_numpy(lengths).double().view(repetitions, rows)
    covered = 0
    for nats_r, of_r in zip(nats, n_r, strict=True):
        estimate = float(nats_r.sum() / of_r.sum())
        error = evaluation_figures.standard_error(nats_r, of_r, estimate)
        assert error is not None
        covered += abs(estimate - truth) < 1.96 * error
    assert 0.93 <= covered / repetitions <= 0.97, covered / repetitions
