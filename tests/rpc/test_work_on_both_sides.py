"""The client splits calls by the work that the server counts: both sides must count the same."""

from __future__ import annotations

import itertools

import pytest

from maskwire.protocol.limits import Bounds
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.results import GenerateOptions, Order, SelfCondMode
from maskwire_server.rpc import decoding, work_limits

SHAPES = list(itertools.product((1, 3), (1, 63, 64, 65, 512)))


def bounds(*, critic: bool, self_cond: bool, max_draws: int) -> tuple[Bounds, ModelInfo]:
    model = ModelInfo(300, 299, None, 512, 1000, "mdlm", True, critic, self_cond)
    return Bounds(Limits(2**20, 2**26, 8, max_draws, 1024, 2**26), model), model


@pytest.mark.parametrize("estimator", ["systematic", "chain_rule"])
@pytest.mark.parametrize(("critic", "self_cond"), list(itertools.product((False, True), repeat=2)))
def test_an_evaluation_counts_the_same(critic: bool, self_cond: bool, estimator: str) -> None:
    for max_draws, draws, generator in itertools.product((4, 64), (0, 1, 4), (False, True)):
        ours, model = bounds(critic=critic, self_cond=self_cond, max_draws=max_draws)
        options = {"estimator": estimator, "draws": draws, "only_train_generator": generator}
        chain = estimator == "chain_rule"
        counted = draws or (1 if chain else min(decoding.DEFAULT_DRAWS, max_draws))
        for rows, columns in SHAPES:
            theirs = work_limits.evaluation_tokens(
                rows, columns, counted, model, chain_rule=chain, only_train_generator=generator
            )
            assert rows * ours.evaluation_work(columns, options) == theirs, (rows, columns, options)


@pytest.mark.parametrize("mode", list(SelfCondMode))
@pytest.mark.parametrize("order", [Order.RANDOM, Order.CRITIC])
@pytest.mark.parametrize("self_cond", [False, True])
def test_a_generation_counts_the_same(self_cond: bool, order: Order, mode: SelfCondMode) -> None:
    ours, model = bounds(critic=True, self_cond=self_cond, max_draws=64)
    for (rows, columns), steps in itertools.product(SHAPES, (0, 1, 40)):
        options = GenerateOptions((0,) * rows, steps=steps, order=order, self_cond_mode=mode)
        theirs = work_limits.generation_tokens([columns] * rows, columns, options, model)
        passes = min(steps or columns, columns)
        first_pass = self_cond and mode is SelfCondMode.TWO_PASS
        row = ours.generation_work(passes, columns, first_pass=first_pass, critic=order is Order.CRITIC)
        assert rows * row == theirs, (rows, columns, steps)
