"""Steps per second over the last while, in bounded room."""

from __future__ import annotations

import pytest

from maskwire_server.engine.throughput import Rate


class Clock:
    now = 1000.25

    def __call__(self) -> float:
        return self.now


def per_second(rate: Rate) -> tuple[float, float]:
    found = rate.recent()
    return found.steps_per_second, found.tokens_per_second


def test_a_young_run_is_judged_by_its_age_and_an_old_one_by_the_last_while() -> None:
    clock = Clock()
    rate = Rate(10, clock)
    assert per_second(rate) == (0, 0)
    for _ in range(100):
        clock.now += 0.05
        rate.add(7)
    assert per_second(rate) == pytest.approx((20, 140))
    clock.now += 100
    assert per_second(rate) == (0, 0)


def test_a_steady_rate_is_found_to_within_a_second_of_the_window() -> None:
    clock = Clock()
    rate = Rate(10, clock)
    for _ in range(40_000):
        clock.now += 1 / 1024
        rate.add(3)
    steps, tokens = per_second(rate)
    assert steps == pytest.approx(1024, rel=0.11)
    assert tokens == pytest.approx(3 * steps)


def test_its_size_does_not_hang_on_how_many_steps_there_are() -> None:
    clock = Clock()
    rate = Rate(10, clock)
    for _ in range(100_000):
        clock.now += 1e-3
        rate.add(1)
    assert len(rate._counts) <= 11
