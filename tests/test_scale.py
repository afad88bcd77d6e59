"""The cost model of docs/scale.md by hand-computed values; its fit finds the costs that made the times."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from bench import scale, scale_ranks
from bench.scale import Costs, Layout, Shape

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPE = Shape(block=100, blocks=2, outside=50)  # 250 weights


def test_a_rank_keeps_its_part_of_four_numbers_or_five() -> None:
    assert scale.state_bytes(SHAPE, 1) == 4 * 4 * 250
    assert scale.state_bytes(SHAPE, 5) == 4 * 4 * 50
    assert scale.state_bytes(Shape(100, 2, 50, averaged=True), 5) == 5 * 4 * 50
    assert scale.gathered_bytes(SHAPE) == 4 * (2 * 50 + 3 * 100)


def test_the_traffic_of_a_part_is_that_of_rings() -> None:
    assert scale.traffic_bytes(SHAPE, Layout(1)) == (0, 0)
    # Two gathers and a scatter of 200 numbers, one of each of 50; a quarter is there already.
    assert scale.traffic_bytes(SHAPE, Layout(4)) == (4 * (3 * 200 + 2 * 50) * 3 / 4, 0)
    assert scale.traffic_bytes(SHAPE, Layout(1, replicate=4)) == (0, 2 * 4 * 250 * 3 / 4)
    conditioned = Shape(100, 2, 50, self_conditioning=True)
    extra = scale.traffic_bytes(conditioned, Layout(4))[0] - scale.traffic_bytes(SHAPE, Layout(4))[0]
    assert extra == 4 * 200 * 3 / 4, "one more pass over the blocks"


def test_a_step_waits_for_the_rank_with_most_positions_in_each_part() -> None:
    costs = Costs(token=1, part=10, unit=0, divided=0, hop=0, byte=0)
    # Rank 0: a row of 3, and an empty part of one position. Rank 1: rows of 3 and 2, too long for one part.
    step = scale.simulate(SHAPE, Layout(2), costs, [3, 3, 2], budget=4)
    assert (step.parts, step.compute, step.communicate) == (2, (3 + 10) + (2 + 10), 0)
    alone = scale.simulate(SHAPE, Layout(1), costs, [4, 4], budget=4)
    assert (alone.parts, alone.compute, alone.communicate) == (2, 28, 0)
    shared = scale.simulate(SHAPE, Layout(2, per_core=2), costs, [4, 4], budget=4)
    assert (shared.parts, shared.compute) == (1, 28), "two ranks take turns on one core"


def test_the_fit_finds_the_costs_that_made_the_times_and_reads_nothing_of_four_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "cores", lambda: 2)
    costs = Costs(token=5e-5, part=6e-3, unit=2e-3, divided=3e-2, hop=1.5e-4, byte=1.1e-9)
    found = scale_ranks.Measured((197_504, 4, 74_112))
    for ranks, rows in itertools.product((1, 2), scale_ranks.ROWS):
        found.steps[ranks, rows] = scale._step(found, ranks, rows, costs).seconds
    for size in scale_ranks.BYTES:
        found.gathers[2, size] = found.scatters[2, size] = (
            costs.hop + (size - scale_ranks.BYTES[0]) / 2 * costs.byte
        )
    fitted = scale.fitted(found)
    for name, value in vars(costs).items():
        if value is not None:
            assert getattr(fitted, name) == pytest.approx(value, rel=1e-6), name


def test_failures_cost_the_restart_and_half_an_interval() -> None:
    # 1,024 devices fail every 7.9 h = 28,440 s; each costs 60 + 150 s.
    share = scale.lost(1024, days_between=scale.DAYS_BETWEEN, restart=60, every=300, pause=0)
    assert share == pytest.approx(210 / 28_440)
    assert scale.lost(1, days_between=1e9, restart=0, every=300, pause=3) == pytest.approx(0.01)


def test_two_processes_train_together_and_are_measured(tmp_path: Path) -> None:
    with scale_ranks.group(2, tmp_path) as ask:
        found = ask({"rows": 2, "steps": 1})
        block, blocks, outside = found["shape"]
        assert (blocks, block * blocks + outside) == (4, 864_128)
        assert found["cpu"] > 0
        assert ask({"gather": 4096, "calls": 1})["cpu"] > 0
        assert ask({"scatter": 4096, "calls": 1})["wall"] > 0


def test_the_page_holds_the_tables_that_the_model_computes() -> None:
    page = (DOCS / "scale.md").read_text()
    for table in scale.tables().split("\n\n"):
        assert table in page
    for command in re.findall(r"python -m (bench\.\w+)", page):
        assert (DOCS.parent / f"{command.replace('.', '/')}.py").is_file()
