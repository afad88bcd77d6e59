"""What must hold for every schedule, masking and weighting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Oracle
from whole_batch import corrupt, losses

from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import draws, masking_schedule, objective
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary, random_ids
from maskwire_server.training.head import Head
from maskwire_server.training.masking_schedule import SCHEDULES
from maskwire_server.training.trainer import TorchTrainer

SETTINGS = [
    ObjectiveConfig(schedule=name, masking=masking, weighting=weighting)
    for name, masking, weighting in itertools.product(
        ("linear", "cosine", "quadratic"), ("exact", "bernoulli"), ("elbo", "masked_mean")
    )
]
NAMES = [f"{s.schedule}-{s.masking}-{s.weighting}" for s in SETTINGS]
VOCABULARY = Vocabulary(11, 10, 9)


def grids(rows: int = 6, n: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, ragged validity, some prompts; one row is all prompt."""
    generator = np.random.default_rng(seed)
    ids = torch.from_numpy(generator.integers(0, 9, (rows, n)))
    lengths = torch.from_numpy(generator.integers(2, n + 1, rows))
    valid = torch.arange(n) < lengths[:, None]
    prompt = torch.from_numpy(generator.random((rows, n)) < 0.25) & valid
    prompt[-1] = valid[-1]
    return ids.masked_fill(~valid, 0), valid, prompt


def corrupted(settings: ObjectiveConfig, number: int = 1, **shape: int) -> Corruption:
    return corrupt(*grids(**shape), settings, VOCABULARY, StepKey(5, 1, number))


def small(objective_: dict[str, Any] | None = None, **serve: Any) -> TorchTrainer:
    whole = config.load(
        None,
        model={
            "num_tokens": 11,
            "mask_id": 10,
            "max_seq_len": 12,
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "dim_head": 16,
        },
        objective=objective_ or {},
        serve={"threads": 2, **serve},
    )
    return TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=3)


def gradients(trainer: TorchTrainer, batch: Batch, modes: Modes | None = None) -> dict[str, torch.Tensor]:
    trainer._gradients(trainer._prepared(trainer._host(batch), modes or Modes(), StepKey(3, 1, 1)))
    found = {name: w.grad.clone() for name, w in trainer.networks.named_parameters() if w.grad is not None}
    trainer._clear_gradients()
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_only_maskable_positions_are_masked_and_counts_are_in_range(settings: ObjectiveConfig) -> None:
    for number in range(1, 30):
        whole = corrupted(settings, number)
        assert not (whole.mask_bn & ~whole.maskable_bn).any()
        assert torch.equal(whole.k_b, whole.mask_bn.sum(-1))
        assert whole.n_b[-1] == 0
        assert whole.k_b[-1] == 0
        if settings.masking == "exact":
            assert ((whole.k_b >= 1) | (whole.n_b == 0)).all()
        assert (whole.k_b <= whole.n_b).all()
        assert torch.equal(whole.input_bn[whole.mask_bn], torch.full((int(whole.k_b.sum()),), 10))
        assert torch.equal(whole.input_bn[~whole.mask_bn], whole.ids_bn[~whole.mask_bn])


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_weights_are_finite_and_positive_where_something_is_masked(settings: ObjectiveConfig) -> None:
    for number in range(1, 30):
        whole = corrupted(settings, number)
        weight_b = objective.position_weights(settings, whole.n_b, whole.k_b)
        assert torch.isfinite(weight_b).all()
        assert (weight_b[whole.k_b > 0] > 0).all()


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 32])
def test_every_count_has_the_same_expected_weight(name: str, masking: str, n: int) -> None:
    # E[w 1[k = kappa] kappa / n] = P(kappa) (1 / (kappa P(kappa))) kappa / n = 1/n.
    k_b, n_b = torch.arange(1, n + 1), torch.full((n,), n)
    chosen = SCHEDULES[name]
    p_b = (
        masking_schedule.exact_probabilities
        if masking == "exact"
        else masking_schedule.bernoulli_probabilities
    )(chosen, k_b, n_b)
    w_b = masking_schedule.elbo_weights(chosen, masking, k_b, n_b)
    assert torch.allclose(p_b * w_b * k_b / n, torch.full((n,), 1 / n, dtype=torch.float64), rtol=1e-9)
    if masking == "exact":
        assert float(p_b.sum()) == pytest.approx(1, abs=1e-12)
    if name == "linear":
        assert torch.allclose(w_b, (n if masking == "exact" else n + 1) / k_b.double(), rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_occur_with_their_probability(name: str) -> None:
    rows, n = 4000, 5
    t_b = masking_schedule.stratified_times(0.37, torch.arange(rows))
    k_b = masking_schedule.exact_counts(SCHEDULES[name], t_b, torch.full((rows,), n))
    k = torch.arange(1, n + 1)
    expected = masking_schedule.exact_probabilities(SCHEDULES[name], k, torch.full((n,), n))
    found = torch.bincount(k_b, minlength=n + 1)[1:] / rows
    assert torch.allclose(found.double(), expected, atol=2 / rows), "stratified: at most one row off an edge"


def test_if_every_cross_entropy_is_one_the_loss_is_one() -> None:
    # Linear, exact count: w k / n = 1. An oracle that always gives probability 1/e.
    logits = torch.full((11,), -30.0, dtype=torch.float64)
    logits[:9] = math.log((1 - math.exp(-1)) / 8)

    def log_probabilities(ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        out = logits.expand(*ids.shape, 11).clone()
        return out.scatter(-1, whole.ids_bn[..., None], -1.0)

    settings = ObjectiveConfig()
    for number in range(1, 6):
        whole = corrupted(settings, number)
        sums = losses(Oracle(10, log_probabilities), settings, VOCABULARY, whole, 1)
        assert float(sums.generator) == pytest.approx(1, abs=1e-9)


def test_ids_under_padding_change_nothing() -> None:
    ids = np.random.default_rng(0).integers(0, 9, (3, 10))
    lengths = np.array([10, 4, 7], dtype=np.int32)
    valid = np.arange(10) < lengths[:, None]
    trainer = small()
    by_lengths = Batch(ids[valid], 3, 10, lengths)
    first = gradients(trainer, by_lengths)
    host = trainer._host(by_lengths)
    host.ids_rn[~torch.from_numpy(valid)] = 7
    trainer._gradients(trainer._prepared(host, Modes(), StepKey(3, 1, 1)))
    for name, weight in trainer.networks.named_parameters():
        assert torch.equal(weight.grad, first[name]), name


def test_logits_at_visible_positions_are_never_computed() -> None:
    trainer = small()
    rows: list[int] = []
    head = trainer.networks.generator.head

    def spy(e_md: torch.Tensor) -> Head:
        rows.append(e_md.shape[0])
        return head(e_md)

    trainer.networks.generator.head = spy  # type: ignore[method-assign]
    ids = np.random.default_rng(0).integers(0, 9, (4, 12))
    result = trainer.train_step(1, 1, Batch(ids, 4, 12), Modes())
    assert rows == [result.masked_tokens]


def test_a_padded_row_has_the_loss_of_the_same_row_unpadded() -> None:
    ids = np.random.default_rng(1).integers(0, 9, (2, 12))
    short = ids[0, :5]
    trainer = small()
    alone = trainer.train_step(1, 1, Batch(short[None], 1, 5), Modes(learning_rate=0.0))
    padded = Batch(np.concatenate([short]), 1, 12, np.array([5], dtype=np.int32))
    again = trainer.train_step(1, 1, padded, Modes(learning_rate=0.0))
    assert again.losses.loss == pytest.approx(alone.losses.loss, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"weighting": "masked_mean"}, {"critic": "token", "self_cond": True}], ids=str
)
def test_micro_batches_have_the_loss_and_gradient_of_the_whole(settings: dict[str, Any]) -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 13, 9).astype(np.int32)
    lengths[0] = 12
    batch = Batch(generator.integers(0, 9, int(lengths.sum())), 9, 12, lengths)
    whole, parts = small(settings), small(settings, micro_batch_tokens=25)
    one, many = gradients(whole, batch), gradients(parts, batch)
    assert one.keys() == many.keys()
    for name in one:
        scale = one[name].abs().max()
        assert torch.allclose(one[name], many[name], rtol=1e-5, atol=float(1e-5 * scale) + 1e-9), name
    first = whole.train_step(1, 1, batch, Modes())
    second = parts.train_step(1, 1, batch, Modes())
    assert second.losses.loss == pytest.approx(first.losses.loss, rel=1e-5)
    assert (first.masked_tokens, first.maskable_tokens) == (second.masked_tokens, second.maskable_tokens)


def test_a_step_has_the_same_loss_to_the_bit_whatever_came_before() -> None:
    ids = np.random.default_rng(4).integers(0, 9, (8, 12))
    batch = Batch(ids, 8, 12)
    frozen = Modes(learning_rate=0.0)
    trainer = small({"critic": "self", "self_cond": True, "random_token_prob": 0.2, "no_replace_prob": 0.1})
    torch.manual_seed(1)
    first = trainer.train_step(1, 7, batch, Modes())
    again = small({"critic": "self", "self_cond": True, "random_token_prob": 0.2, "no_replace_prob": 0.1})
    torch.manual_seed(2)
    torch.rand(3)
    second = again.train_step(1, 7, batch, Modes())
    assert first == second
    assert again.train_step(1, 8, batch, frozen).losses != again.train_step(1, 9, batch, frozen).losses
    assert again.train_step(1, 8, batch, frozen).losses != again.train_step(2, 8, batch, frozen).losses


@pytest.mark.parametrize("first_pass", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_trained_weight_has_a_gradient(first_pass: float, precision: str) -> None:
    settings = {"self_cond": True, "self_cond_prob": first_pass, "critic": "token"}
    trainer = small(settings, precision=precision)
    ids = np.random.default_rng(5).integers(0, 9, (2, 12))
    found = gradients(trainer, Batch(ids, 2, 12))
    assert set(found) == {name for name, _ in trainer.networks.named_parameters()}


def test_augmentation_keeps_and_replaces_at_the_configured_rates() -> None:
    settings = ObjectiveConfig(no_replace_prob=0.15, random_token_prob=0.1)
    ids, valid, prompt = grids(64, 64)
    kept = replaced = masked = 0
    for number in range(1, 60):
        whole = corrupt(ids, valid, prompt, settings, VOCABULARY, StepKey(5, 1, number))
        seen, true = whole.input_bn[whole.mask_bn], whole.ids_bn[whole.mask_bn]
        assert not (seen == 9).any(), "never the pad id"
        masked += seen.numel()
        kept += int((seen == true).sum())
        replaced += int(((seen != true) & (seen != 10)).sum())
        assert torch.equal(whole.input_bn[~whole.mask_bn], ids[~whole.mask_bn])
    # A random id is the true one in 1 of 9.
    assert kept / masked == pytest.approx(0.15 + 0.1 / 9, abs=0.005)
    assert replaced / masked == pytest.approx(0.1 * 8 / 9, abs=0.005)


def test_each_kind_of_augmentation_has_one_coin_per_batch() -> None:
    settings = ObjectiveConfig(no_replace_prob=0.5, random_token_prob=0.5, augment_prob=0.5)
    ids, valid, prompt = grids(8, 64)
    seen = set()
    for number in range(1, 80):
        whole = corrupt(ids, valid, prompt, settings, VOCABULARY, StepKey(5, 1, number))
        shown, true = whole.input_bn[whole.mask_bn], whole.ids_bn[whole.mask_bn]
        if shown.numel() >= 40:
            seen.add(
                (bool(((shown != 10) & (shown != true)).any()), bool((shown == true).float().mean() > 0.3))
            )
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_random_ids_are_data_and_equally_likely() -> None:
    u = draws.uniform(torch.tensor([draws.key(draws.Purpose.RANDOM_ID, 1)]), 90_000)[0]
    for vocabulary in (
        Vocabulary(11, 10, None),
        Vocabulary(11, 0, 1),
        Vocabulary(11, 5, 6),
        Vocabulary(11, 6, 5),
    ):
        counts = torch.bincount(random_ids(u, vocabulary), minlength=11)
        assert counts.numel() == 11
        assert all(counts[special] == 0 for special in vocabulary.special)
        data = counts[counts > 0].double()
        assert data.numel() == 11 - len(vocabulary.special)
        assert ((data / data.mean() - 1).abs() < 0.05).all()


def test_a_step_in_which_chance_masks_nothing_changes_nothing() -> None:
    trainer = small({"masking": "bernoulli", "schedule": "quadratic"})
    batch = Batch(np.array([[1]]), 1, 1)
    before = {name: w.clone() for name, w in trainer.networks.state_dict().items()}
    results = [trainer.train_step(1, step, batch, Modes(learning_rate=0.0)) for step in range(1, 40)]
    empty = [step for step, result in enumerate(results, 1) if not result.masked_tokens]
    assert empty, "a single position stays visible now and then"
    again = trainer.train_step(1, empty[0], batch, Modes())
    assert (again.losses.loss, again.gradient_norm) == (0, 0)
    assert all(torch.equal(w, before[name]) for name, w in trainer.networks.state_dict().items())


def test_the_time_of_a_row_is_random() -> None:
    # Stratified times go to rows in random order: row 0's mean count must not differ from row 63's.
    settings = ObjectiveConfig()
    ids = torch.zeros(64, 16, dtype=torch.int64)
    every = torch.ones(ids.shape, dtype=torch.bool)
    counts = torch.stack(
        [corrupt(ids, every, ~every, settings, VOCABULARY, StepKey(1, 1, s)).k_b for s in range(400)]
    ).double()
    assert torch.allclose(counts.mean(1), torch.full((400,), 8.5, dtype=torch.float64), atol=0.51)
    # Each row's mean has standard error 4.6 / sqrt(400) = 0.23; four of them.
    assert (counts.mean(0) - 8.5).abs().max() < 0.95


def test_the_draws_are_those_of_the_published_splitmix64() -> None:
    # SplitMix64 from seed 0, as in the reference implementation by Vigna.
    first = draws.bits(torch.tensor([0]), 3)[0].tolist()
    assert [value % 2**64 for value in first] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    u = draws.uniform(draws.keys(draws.Purpose.MASK, 1, rows=range(300)), 300)
    assert u.min() >= 0
    assert u.max() < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(torch.corrcoef(u[:2])[0, 1]) == pytest.approx(0, abs=0.25)
