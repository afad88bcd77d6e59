"""Iterative unmasking, compared with a slow reference, an oracle and a trained model."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Oracle, pairs_oracle
from reference_sampler import any_order, counts, prompts_of, shaped, stays, sure
from torch import Tensor

from maskwire_server.batch import Prompts
from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import Diverged
from maskwire_server.results import GenerateOptions, GenerationState, Order, SelfCondMode
from maskwire_server.training import draws, masking_schedule, sampling
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.cross_entropy import forbid_special
from maskwire_server.training.draws import Purpose

FRACTIONS = {"linear": lambda t: 1 - t, "cosine": lambda t: math.cos(math.pi * t / 2),
             "quadratic": lambda t: (1 - t) ** 2}  # fmt: skip


def table_oracle(n: int, symbols: int, seed: int = 0) -> Oracle:
    """Conditionals drawn at random for every input: no consistent joint distribution has them."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((symbols + 1) ** n, n, symbols + 1, generator=generator, dtype=torch.float64) * 1.5
    powers = (symbols + 1) ** torch.arange(n)
    return Oracle(symbols, lambda ids, _: table[(ids * powers[: ids.shape[1]]).sum(-1)])


def conditional_of(oracle: Oracle, symbols: int) -> Any:
    """The oracle's conditionals as the reference wants them, without the mask id."""

    def conditional(row: tuple[int, ...], position: int) -> list[float]:
        ids = torch.tensor([row])
        logits = oracle.log_probabilities(ids, ids == symbols)[0, position, :symbols]
        shares: list[float] = logits.softmax(-1).tolist()
        return shares

    return conditional


def run(
    networks: Any,
    prompts: Prompts,
    options: GenerateOptions,
    symbols: int,
    settings: ObjectiveConfig | None = None,
    budget: int = 2**20,
) -> list[GenerationState]:
    with torch.no_grad():
        return list(
            sampling.generate(
                networks,
                settings or ObjectiveConfig(),
                Vocabulary(symbols + 1, symbols, None),
                prompts,
                options,
                budget=budget,
                device=torch.device("cpu"),
            )
        )


# The distribution.


@pytest.mark.parametrize(
    ("n", "symbols", "prompt"), [(3, 3, []), (4, 2, []), (6, 2, [(1, 0), (4, 1), (5, 0)])], ids=str
)
def test_the_defaults_sample_from_the_any_order_distribution(
    n: int, symbols: int, prompt: list[tuple[int, int]]
) -> None:
    oracle = table_oracle(n, symbols)
    row = [symbols] * n
    prompts = Prompts.nothing(40_000, n)
    for position, id_ in prompt:
        row[position] = id_
        prompts.ids[:, position], prompts.known[:, position] = id_, True
    expected = any_order(conditional_of(oracle, symbols), row, symbols)
    assert sum(expected.values()) == pytest.approx(1)
    options = GenerateOptions(tuple(range(1, 40_001)))
    found = Counter(map(tuple, run(oracle, prompts, options, symbols)[-1].ids.tolist()))
    assert set(found) <= set(expected)
    # A frequency is within 4.5 of its standard errors sqrt(p(1-p)/N): for at most 27 cells and 3 cases
    # this fails once in 2,000 seeds, and the seed is fixed.
    for filled, probability in expected.items():
        error = math.sqrt(probability * (1 - probability) / 40_000)
        assert abs(found[filled] / 40_000 - probability) < 4.5 * error, filled


def test_another_order_samples_another_distribution() -> None:
    oracle = table_oracle(3, 3)
    expected = any_order(conditional_of(oracle, 3), [3] * 3, 3)
    options = GenerateOptions(tuple(range(20_000)), order=Order.CONFIDENCE)
    found = Counter(map(tuple, run(oracle, Prompts.nothing(20_000, 3), options, 3)[-1].ids.tolist()))
    worst = max(
        abs(found[filled] / 20_000 - p) / math.sqrt(p * (1 - p) / 20_000) for filled, p in expected.items()
    )
    assert worst > 20, "a heuristic, and said so"


# The schedule.


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7, 12, 100])
def test_the_masked_counts_follow_the_schedule_and_always_fall(name: str, steps: int) -> None:
    for unknown in range(1, 13):
        expected = counts(FRACTIONS[name], unknown, steps)
        left, found = torch.tensor([unknown]), []
        while int(left):
            left = sampling.stay_masked(
                masking_schedule.SCHEDULES[name], torch.tensor([unknown]), left, len(found) + 1, steps
            )
            found.append(int(left))
        assert found == expected
        assert len(found) <= min(unknown, steps or unknown)
        assert found[-1] == 0


def test_with_as_many_steps_as_unknowns_a_linear_pass_reveals_one() -> None:
    for unknown in (*range(1, 66), *range(99, 300, 25), 127, 128, 129, 255, 256, 257):
        u = torch.tensor([unknown])
        before = u
        for step in range(1, unknown + 1):
            before = sampling.stay_masked(masking_schedule.LINEAR, u, before, step, unknown)
            assert int(before) == unknown - step


def test_every_pass_reveals_a_position() -> None:
    oracle = table_oracle(5, 2)
    prompts = prompts_of([[None] * 5, [0, 1, None], [1, 1, 0, 0], [None, None]])
    for steps, passes in ((0, 5), (100, 5), (2, 2), (1, 1)):
        oracle.seen.clear()
        options = GenerateOptions((1, 2, 3, 4), steps=steps, order=Order.MARGIN)
        states = run(oracle, prompts, options, 2)
        assert len(states) == len(oracle.seen) == passes
        assert [state.unmasking_step for state in states] == list(range(1, passes + 1))
        assert [state.done for state in states] == [False] * (passes - 1) + [True]
        rows = [len(seen) for seen in oracle.seen]
        if steps in (0, 100):  # 5, 1, 0 and 2 unknown positions: finished rows take no pass
            assert rows == [3, 2, 1, 1, 1]
        assert not bool((torch.cat([s[:, 2:] for s in oracle.seen]) < 0).any())


def test_logits_are_computed_only_where_they_are_needed() -> None:
    oracle = table_oracle(6, 2)
    projected: list[int] = []

    def project(e_md: Tensor) -> Tensor:
        projected.append(len(e_md))
        return e_md

    oracle.project = project  # type: ignore[method-assign]
    run(oracle, Prompts.nothing(4, 6), GenerateOptions((1, 2, 3, 4)), 2)
    assert projected == [4] * 6, "in random order: where a token is revealed"
    projected.clear()
    run(oracle, Prompts.nothing(4, 6), GenerateOptions((1, 2, 3, 4), order=Order.ENTROPY), 2)
    assert projected == [24, 20, 16, 12, 8, 4], "otherwise: where something is masked"


# Sampling.


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (0.5, 0, 0.8), (2.0, 5, 0.7), (1.0, 1, 1.0),
     (1.0, 0, 1e-9)],
)  # fmt: skip
def test_top_k_and_top_p_sample_what_the_naive_filters_keep(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5
    expected = shaped(logits.softmax(-1).tolist(), temperature, top_k, top_p)
    count = 60_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # a grid: the frequencies are exact
    options = GenerateOptions((), temperature=temperature, top_k=top_k, top_p=top_p)
    found = sampling.sample(logits.expand(count, -1), u, temperature, options).bincount(minlength=7) / count
    assert found.tolist() == pytest.approx(expected, abs=2 / count)


def test_temperature_0_takes_the_most_probable_id() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2)) * 3
    u = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for temperature, top_k, top_p in itertools.product((0.0, 1e-30, 1e-6), (0, 4), (1.0, 0.5)):
        options = GenerateOptions((), temperature=temperature, top_k=top_k, top_p=top_p)
        assert sampling.sample(logits, u, temperature, options).equal(logits.argmax(-1))


def test_annealed_temperatures_apply_to_each_row_and_pass() -> None:
    n, symbols = 6, 3
    oracle = table_oracle(n, symbols, seed=8)
    prompts = prompts_of([[None] * 6, [0, None, 1, None, 2, 0], [None] * 5])
    for steps in (0, 4):
        options = GenerateOptions((5, 6, 7), order=Order.CONFIDENCE, start_temperature=3.0, steps=steps)
        states = run(oracle, prompts, options, symbols)
        rows = np.where(prompts.unknown, symbols, prompts.ids)
        for state in states:
            for row, unknown in enumerate((6, 2, 5)):
                s, of = state.unmasking_step, steps or unknown
                temperature = 3.0 * max(0, 1 - s / of)
                constant = GenerateOptions((), temperature=temperature if temperature >= 1e-3 else 0.0)
                seen = rows[row].tolist()
                sampled = full_sample(oracle, seen, options.row_seeds[row], s, constant)
                for i in range(n):
                    if seen[i] == symbols and state.ids[row, i] != symbols:
                        assert state.ids[row, i] == sampled[i], (steps, s, row, i)
            rows = state.ids
        assert states[-1].done


# The order.


@pytest.mark.parametrize("order", [Order.CONFIDENCE, Order.MARGIN, Order.ENTROPY])
def test_each_order_reveals_the_same_positions_as_the_naive_one(order: Order) -> None:
    n, symbols = 6, 3
    oracle = table_oracle(n, symbols, seed=5)
    conditional = conditional_of(oracle, symbols)
    for steps in (0, 2, 4):
        options = GenerateOptions(tuple(range(20)), order=order, steps=steps)
        states = run(oracle, Prompts.nothing(20, n), options, symbols)
        for row in range(20):
            seen = [symbols] * n
            for state in states:
                now = state.ids[row].tolist()
                sampled = full_sample(oracle, seen, options.row_seeds[row], state.unmasking_step, options)
                masked = [i for i in range(n) if seen[i] == symbols]
                scores = {
                    i: sure(order.name.lower(), conditional(tuple(seen), i), sampled[i]) for i in masked
                }
                stay = stays(scores, state.still_masked[row])
                expected = [
                    symbols if i in stay else sampled[i] if i in masked else seen[i] for i in range(n)
                ]
                assert now == expected
                seen = now


def full_sample(oracle: Oracle, row: list[int], seed: int, step: int, options: GenerateOptions) -> list[int]:
    """What a pass samples at every position of a row."""
    ids = torch.tensor([row])
    symbols = oracle.mask_id
    logits = forbid_special(
        oracle.log_probabilities(ids, ids == symbols)[0], Vocabulary(symbols + 1, symbols, None)
    )
    u = draws.uniform(draws.nth(draws.keys(Purpose.GENERATION_TOKEN, rows=[seed]), step), len(row))[0]
    sampled: list[int] = sampling.sample(logits, u, options.temperature, options).tolist()
    return sampled


def test_the_critic_order_follows_the_critic_and_skips_it_in_the_last_pass() -> None:
    n, symbols = 5, 3
    oracle = table_oracle(n, symbols, seed=6)
    seen: list[Tensor] = []

    def criticize(ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        assert not train_trunk
        assert not bool((ids_bn == symbols).any()), "the critic sees filled rows"
        seen.append(ids_bn)
        # wrong where ids are high, position as the tie-breaker
        return ids_bn + torch.arange(n) * 0.1

    oracle.criticize = criticize  # type: ignore[method-assign]
    options = GenerateOptions(tuple(range(8)), order=Order.CRITIC)
    states = run(oracle, Prompts.nothing(8, n), options, symbols)
    assert len(states) == n
    assert len(seen) == n - 1
    before = np.full((8, n), symbols)
    for state, filled in zip(states, seen, strict=False):
        for row in range(8):
            masked = [i for i in range(n) if before[row, i] == symbols]
            best = min(masked, key=lambda i: int(filled[row, i]) + i * 0.1)
            revealed = [i for i in masked if state.ids[row, i] != symbols]
            assert revealed == [best]
            assert state.ids[row, best] == filled[row, best]
        before = state.ids


def test_the_noise_on_the_order_is_gumbel_and_falls_to_zero() -> None:
    # Scores s + g with standard Gumbel noise: the first revealed is i with probability softmax(s)_i.
    scores = torch.tensor([0.5, -1.0, 1.0, 0.0], dtype=torch.float64)
    symbols = 1

    def log_probabilities(ids: Tensor, masked: Tensor) -> Tensor:
        out = torch.full((*ids.shape, 3), -1e9, dtype=torch.float64)
        sure_bn = scores.log_softmax(-1).expand(ids.shape)  # log-probabilities that are the scores
        out[..., 0] = sure_bn
        out[..., 1] = torch.log1p(-sure_bn.exp())
        return out

    oracle = Oracle(2, log_probabilities)
    count = 20_000
    options = GenerateOptions(
        tuple(range(count)), order=Order.CONFIDENCE, temperature=1.0, choice_temperature=4 / 3
    )
    # Only rows where id 0 was sampled everywhere have the known scores.
    state = run(oracle, Prompts.nothing(count, 4), options, symbols + 1)[0]
    keys = draws.keys(Purpose.GENERATION_TOKEN, rows=range(count))
    u = draws.uniform(draws.nth(keys, 1), 4)
    zeros = (u < scores.softmax(-1)).all(-1).numpy()
    first = (state.ids[zeros] != 2).argmax(1)
    assert (state.ids[zeros] != 2).sum(1).max() == 1
    total = int(zeros.sum())
    # noise scale 4/3 * (1 - 1/4) = 1
    for position, p in enumerate(scores.softmax(-1).tolist()):
        error = math.sqrt(p * (1 - p) / total)
        assert abs((first == position).mean() - p) < 4 * error
    last = sampling.plan_pass(ObjectiveConfig(), options, torch.full((count,), 4), torch.full((count,), 1), 4)
    assert not bool(last.noise_b.any())


def test_the_preset_maskgit_sets_the_choice_temperature() -> None:
    told = {
        (preset, given): float(
            sampling.plan_pass(
                ObjectiveConfig(preset=preset),
                GenerateOptions((1,), choice_temperature=given, steps=4),
                torch.tensor([8]),
                torch.tensor([8]),
                1,
            ).noise_b[0]
        )
        for preset in ("mdlm", "maskgit")
        for given in (None, 2.0)
    }
    assert told == {("mdlm", None): 0, ("mdlm", 2.0): 1.5, ("maskgit", None): 3.375, ("maskgit", 2.0): 1.5}


# Remasking.


def test_remasking_ranks_by_the_probability_recorded_when_a_token_was_revealed() -> None:
    n, symbols = 6, 3
    oracle = table_oracle(n, symbols, seed=7)
    conditional = conditional_of(oracle, symbols)
    options = GenerateOptions(tuple(range(40)), order=Order.CONFIDENCE, remasking=True)
    states = run(oracle, Prompts.nothing(40, n), options, symbols)
    again = 0
    for row in range(40):
        seen, recorded = [symbols] * n, dict.fromkeys(range(n), 0.0)
        for state in states:
            sampled = full_sample(oracle, seen, options.row_seeds[row], state.unmasking_step, options)
            for i in range(n):
                if seen[i] == symbols:
                    recorded[i] = math.log(conditional(tuple(seen), i)[sampled[i]])
            stay = stays(recorded, state.still_masked[row])
            filled = [sampled[i] if seen[i] == symbols else seen[i] for i in range(n)]
            again += sum(seen[i] != symbols for i in stay)
            seen = state.ids[row].tolist()
            assert seen == [symbols if i in stay else filled[i] for i in range(n)]
    assert again > 0, "some were masked again"


@pytest.mark.parametrize("remasking", [False, True])
def test_revealed_positions_stay_without_remasking_and_prompts_always_stay(remasking: bool) -> None:
    oracle = table_oracle(6, 3, seed=8)
    prompts = prompts_of([[None, 2, None, None, 0, None]] * 30)
    options = GenerateOptions(tuple(range(30)), order=Order.CONFIDENCE, remasking=remasking)
    states = run(oracle, prompts, options, 3)
    changed = 0
    for before, after in itertools.pairwise(states):
        assert (after.ids[:, [1, 4]] == [2, 0]).all()
        revealed = before.ids != 3
        changed += int((after.ids != before.ids)[revealed].sum())
    assert bool(changed) == remasking


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [Order.RANDOM, Order.CONFIDENCE, Order.MARGIN, Order.ENTROPY])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}])
def test_non_finite_logits_are_not_sampled(value: float, order: Order, options: dict[str, Any]) -> None:
    oracle = Oracle(2, lambda ids, _: torch.full((*ids.shape, 3), value))
    with pytest.raises(Diverged, match="the generator's logits are not finite"):
        run(oracle, Prompts.nothing(1, 4), GenerateOptions((1,), order=order, **options), 2)


# Self-conditioning.


class Recording(Oracle):
    def __init__(self) -> None:
        super().__init__(2, lambda ids, _: torch.zeros(*ids.shape, 3))
        self.conds: list[Any] = []
        self.count = 0.0

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        self.conds.append(cond)
        self.count += 1
        return super().embed(ids_bn, valid_bn, cond, read_m) + self.count

    def conditioning(self, e_bnd: Tensor | None) -> Tensor | None:
        return torch.tensor(-1.0) if e_bnd is None else e_bnd


def test_two_pass_conditions_on_the_same_input_and_carry_on_the_previous_pass() -> None:
    settings = ObjectiveConfig(self_cond=True)

    def seen(mode: SelfCondMode) -> list[float]:
        networks = Recording()
        run(networks, Prompts.nothing(2, 3), GenerateOptions((1, 2), self_cond_mode=mode), 2, settings)
        return [float(cond.max()) for cond in networks.conds]

    assert seen(SelfCondMode.TWO_PASS) == [-1, 1, -1, 3, -1, 5]
    assert seen(SelfCondMode.CARRY) == [-1, 1, 2]


def test_carried_embeddings_stay_with_their_row() -> None:
    networks = Recording()
    prompts = prompts_of([[0, None, 0], [None, None, None]])
    options = GenerateOptions((1, 2), self_cond_mode=SelfCondMode.CARRY)
    run(networks, prompts, options, 2, ObjectiveConfig(self_cond=True), budget=3)
    # Passes: row 0 alone (1), row 1 alone (2), then row 1 on what it had: 2, then 3.
    assert [float(cond.max()) for cond in networks.conds] == [-1, -1, 2, 3] or [
        float(cond.max()) for cond in networks.conds
    ] == [-1, 0, 2, 3]


# Sources.


def test_an_oracle_of_pairs_generates_only_pairs_in_confidence_order() -> None:
    options = GenerateOptions(tuple(range(50)), order=Order.CONFIDENCE)
    last = run(pairs_oracle(4), Prompts.nothing(50, 12), options, 4)[-1]
    assert (last.ids[:, ::2] == last.ids[:, 1::2]).all()
