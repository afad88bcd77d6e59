"""The benchmarks' own arithmetic and processes, in small."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import fork_server
import numpy as np
import pytest

import maskwire
from bench import __main__ as command
from bench import generation, gpu, gpu_kills, learner, learning, peer, picture
from bench.harness import Row, in_flight_steps, in_turn, module, process, ratio
from bench.serving import durable_insert, in_flight
from bench.sources import flip_chain, pairs


def test_a_ratio_is_of_pairs_and_has_its_spread() -> None:
    row = ratio(Row("P0", "a", "≤ 2", None), [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], at_most=2)
    assert (row.value, row.low, row.high, row.met) == (2.0, 2.0, 3.0, True)
    assert ratio(Row("P0", "a", "≥ 3", None), [2.0], [1.0], at_least=3).met is False


def test_measures_take_turns() -> None:
    order: list[str] = []
    found = in_turn(2, lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0)
    assert order == ["a", "b", "a", "b"]
    assert found == [[1.0, 1.0], [2.0, 2.0]]


def test_the_servers_that_are_measured_serve(tmp_path: Path) -> None:
    with (
        process(*module("null_server", tmp_path / "run"), log=tmp_path / "log") as target,
        maskwire.connect(target, window=8) as trainer,
    ):
        assert in_flight_steps(trainer, np.zeros((1, 8), dtype=np.uint8), 20) > 0
        assert trainer.step == 20
        assert in_flight(lambda: trainer.submit(np.zeros((1, 8), dtype=np.uint8)), 20) > 0
    insert = durable_insert(tmp_path)
    insert()


def test_the_table_shows_what_was_not_measured_as_that() -> None:
    rows = [
        Row("P1", "a", "≥ 1", 1.234, 1.0, 1.5, True, on="2026-01-02", parts={"x ms": 1234.5}),
        Row("P2", "b", "≥ 1", None, note="not measured: no GPU"),
    ]
    table = command.markdown(rows)
    assert "| P1 | a | ≥ 1 | **1.23** | 1.00 – 1.50 | yes | x ms 1,234 | 2026-01-02 |" in table
    assert "| P2 | b | ≥ 1 | not measured: no GPU |" in table


def test_rows_that_are_measured_again_take_their_places() -> None:
    before = [Row("P1", "a", "", 1.0), Row("P3", "b", "", 2.0)]
    again = [Row("P3", "b", "", 3.0), Row("P2", "c", "", 4.0)]
    found = command.replaced([vars(row) for row in before], again, {"P1"})
    assert [(row.name, row.value) for row in found] == [("P1", 1.0), ("P2", 4.0), ("P3", 3.0)]
    found = command.replaced([vars(row) for row in before], again, set())
    assert [row.name for row in found] == ["P2", "P3"], "what its suite gives no more is gone"


def test_the_page_holds_what_was_measured() -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    if not (docs / "benchmarks.json").exists():
        pytest.skip("nothing was measured yet: make bench")
    rows = [Row(**row) for row in json.loads((docs / "benchmarks.json").read_text())["rows"]]
    assert command.markdown(rows) in (docs / "benchmarks.md").read_text()


def test_the_picture_shows_what_has_a_target_as_a_share_of_it(tmp_path: Path) -> None:
    assert picture.reached(Row("P1", "a", "≥ 0.5", 1.0)) == 2
    assert picture.reached(Row("P8", "a", "≤ 2 s", 4.0)) == 0.5
    assert picture.reached(Row("P2", "a", "≤ 1.1", None)) is None
    assert picture.reached(Row("L3", "a", "> 2 standard errors", 0.1)) is None
    picture.overview([Row("P1", "a", "≥ 0.5", 1.0, met=True), Row("P2", "b", "", 1.0)], tmp_path / "a.png")
    curves = {arm: [[(60.0, 3.0), (120.0, 2.0)], [(60.5, 3.5), (121.0, 2.5)]] for arm in learner.ARMS}
    picture.learning_curves(curves, tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_what_the_known_sources_are_worth_is_their_entropy() -> None:
    rng = np.random.default_rng(0)
    flips = flip_chain(rng, 20_000, learning.LENGTH, learning.FLIP)
    changed = (flips[:, 1:] != flips[:, :-1]).mean()
    assert changed == pytest.approx(learning.FLIP, abs=0.005)
    assert pytest.approx(0.348087, abs=2e-6) == learning.FLIP_NATS
    twins = pairs(rng, 100, learning.LENGTH, 8)
    assert (twins[:, ::2] == twins[:, 1::2]).all()


@pytest.mark.parametrize("arm", ["peer", "bernoulli", "linear"])
def test_a_run_of_l3_gives_ten_points(
    arm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("x_transformers")
    files = learner.python_sources()[:30]
    monkeypatch.setattr(learner, "ROWS", 8)
    monkeypatch.setattr(learner, "python_sources", lambda: files)
    monkeypatch.setattr(learner, "perf_counter", itertools.count().__next__)  # each step takes a second
    monkeypatch.setattr("sys.argv", ["learner", arm, "0", "20", "--rows", "2"])
    learner.main()
    curve = json.loads(capsys.readouterr().out)["curve"]
    assert [seconds for seconds, _ in curve] == list(range(2, 21, 2))
    assert curve[-1][1] < curve[0][1] - 1


def test_the_flops_of_a_step_are_those_of_its_matrices() -> None:
    # One block, everything masked: 4·64·64 + 8·64² weights, scores 4·8·64, projection 64·11; thrice.
    assert peer.step_flops(2, 8, 64, 1, 1, 11, 16) == 3 * 16 * (2 * (12 * 64**2) + 4 * 8 * 64 + 2 * 64 * 11)
    # Nothing masked: keys and values alone.
    assert peer.step_flops(2, 8, 64, 1, 1, 11, 0) == 3 * 16 * 2 * 2 * 64**2


def test_a_row_without_its_peer_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError

    monkeypatch.setattr(generation, "reference", absent)
    rows = generation.measure(quick=True)
    assert [row.value for row in rows] == [None, None]
    assert all("pip install" in row.note for row in rows)


def test_the_gpu_benchmark_runs_on_a_cpu_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("x_transformers")
    forking = SimpleNamespace(Popen=fork_server.Process, PIPE=subprocess.PIPE)
    for owner in (gpu, gpu_kills):
        monkeypatch.setattr(owner, "subprocess", forking)
    assert command.main(["--gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = [Row(**row) for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]]
    assert [row.name for row in rows] == ["P10", "P10", "P10", "R11", "R11"]
    assert all(row.value is not None for row in rows), [row.note for row in rows]
    assert all(row.met for row in rows if row.name == "R11"), rows
    assert capsys.readouterr().out.rstrip().endswith(command.markdown(rows)), "the table comes last"
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_benchmark_without_time_says_what_it_left_out() -> None:
    rows, _ = gpu.measure("cpu", quick=True, seconds=0)
    assert [row.value for row in rows] == [None] * 5
    assert all(row.note.startswith("not measured: ") for row in rows), [row.note for row in rows]


def test_a_gpu_benchmark_keeps_what_it_measured_before_the_time_was_over() -> None:
    rows = gpu.Rows(gpu.plan("cpu", quick=True))
    rows.ours, rows.products = [{"steps_per_second": 2.0, "masked": 32.0, "peak_gib": 1.0}], [1e9]
    rows.stopped = "TimeoutError: the time was over"
    flops, served, peer_row = rows.rows()
    assert flops.value is not None
    assert served.note == peer_row.note == "not measured: TimeoutError: the time was over"


def test_a_gpu_benchmark_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
