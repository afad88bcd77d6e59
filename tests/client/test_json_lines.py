"""The file of metrics: repaired after a kill, filled in from the server, whole whatever came between."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from recorded_run import Server, log_steps

from maskwire.errors import UnimplementedError
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.records import Place
from maskwire.results import StepsPage

START = Place("run", 1, 0)


def use(path: Path, server: Server, seen: range = range(0)) -> list[dict[str, Any]]:
    """Open the file as a call of `fit` does, write the steps that it sees, and read all lines."""
    log_steps(JsonLines(path), server, seen)
    return [json.loads(line) for line in path.read_text().splitlines()]


def places(lines: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(line["lineage"], line["step"], line.get("event", "")) for line in lines]


def steps(lineage: int, *numbers: int) -> list[tuple[int, int, str]]:
    return [(lineage, number, "") for number in numbers]


def test_the_steps_between_the_last_line_and_the_run_are_filled_in_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    use(path, Server((0, 0, 2)), range(3, 6))
    lines = use(path, Server((0, 0, 14)))
    assert places(lines) == [(1, 2, "started"), *steps(1, *range(3, 15))]
    assert [line["filled_in"] for line in lines if "filled_in" in line] == [True] * 9
    filled = lines[-1]
    assert (filled["loss"], filled["generator_loss"], filled["gradient_norm"]) == (None, 1.0, 0.5)
    assert (filled["tokens"], filled["time"], filled["digest"]) == (None, None, "010e" * 16)
    assert use(path, Server((0, 0, 14))) == lines
    whole = Server((0, 0, 14))
    use(path, whole)
    assert whole.asked == 0, "nothing is missing, nothing is asked for"


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_that_was_not_written_whole_is_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    before = use(path, Server((0, 0, 0)), range(1, 5))
    os.truncate(path, path.stat().st_size - cut)  # cut 1: whole but for the end of the line
    lines = use(path, Server((0, 0, 4)))
    assert places(lines) == places(before)
    path.write_bytes(path.read_bytes() + b"\0" * 100)  # what a power loss can leave
    assert use(path, Server((0, 0, 4))) == lines


@pytest.mark.parametrize("left", [b"", b'{"run', b"\0" * 9])
def test_a_job_that_was_stopped_before_its_first_line_began_with_the_run(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "m.jsonl"
    assert use(path, Server((0, 0, 0))) == []
    path.write_bytes(left)
    assert places(use(path, Server((0, 0, 4)), range(5, 6))) == steps(1, 1, 2, 3, 4, 5)
    behind = tmp_path / "behind.jsonl"
    assert places(use(behind, Server((0, 0, 4)))) == [(1, 4, "started")]
    assert places(use(behind, Server((0, 0, 6)))) == [(1, 4, "started"), *steps(1, 5, 6)]


def test_after_restores_the_file_has_each_lineage_and_says_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    use(path, Server((0, 0, 0)), range(1, 4))
    # Steps 4 to 6 were not seen; twice a checkpoint was restored, the first time without a later step.
    lines = use(path, Server((0, 0, 6), (1, 5, 5), (1, 2, 4)), range(5, 7))
    assert places(lines) == [
        *steps(1, 1, 2, 3, 4, 5, 6), (2, 5, "restored"), (3, 2, "restored"),
        *steps(3, 3, 4, 5, 6),
    ]  # fmt: skip
    restored = next(line for line in lines if line["lineage"] == 3)
    assert (restored["parent_lineage"], restored["checkpoint"], restored["run_id"]) == (1, "from-2", "run")


@pytest.mark.parametrize("kept", range(11))
def test_filling_in_that_was_itself_broken_off_ends_the_same(tmp_path: Path, kept: int) -> None:
    server = Server((0, 0, 6), (1, 5, 5), (1, 2, 4))
    path, whole = tmp_path / "m.jsonl", tmp_path / "whole.jsonl"
    for one in (path, whole):
        use(one, Server((0, 0, 0)), range(1, 4))
    lines = use(path, server)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:kept]))
    assert places(use(path, server)) == places(use(whole, server)) == places(lines)


@pytest.mark.parametrize(
    "server",
    [Server((0, 0, 3), run_id="another"), Server((0, 0, 2)), Server((0, 0, 9), run_id="")],
    ids=["another run", "a run that lost steps", "nameless"],
)
def test_the_steps_of_another_history_begin_with_a_line_that_says_so(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "m.jsonl"
    use(path, Server((0, 0, 0)), range(1, 5))
    lines = use(path, server, range(server.step + 1, server.step + 3))
    begun = lines[4]
    assert (begun["event"], begun["run_id"], begun["step"]) == ("started", server.run_id, server.step)
    assert len(lines) == 7


def test_a_file_of_an_older_version_is_gone_on_with_if_it_is_of_this_run(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    old = {"step": 4, "loss": 1.0, "digest": Server.digest_of(1, 4).hex()}
    path.write_text(json.dumps(old) + "\n" + json.dumps({"step": 4, "eval_bits_per_token": 2.0}) + "\n")
    lines = use(path, Server((0, 0, 6)))
    assert places(lines[2:]) == steps(1, 5, 6)
    path.write_text(json.dumps({**old, "digest": "00" * 32}) + "\n")
    assert places(use(path, Server((0, 0, 6)))[1:]) == [(1, 6, "started")]


def test_a_server_without_the_list_of_steps_leaves_the_gap(tmp_path: Path) -> None:
    class Older(Server):
        def steps_page(self, **_: Any) -> StepsPage:
            raise UnimplementedError("no such method")

    path = tmp_path / "m.jsonl"
    use(path, Server((0, 0, 0)), range(1, 3))
    lines = use(path, Older((0, 0, 5)), range(6, 7))
    assert places(lines[2:]) == [(1, 5, "started"), (1, 6, "")]


OTHERS = [
    "step,loss\n1,2\n", "some text", "[1]\n", '"a"\n', "{}\nx", "1\n", "a source file\nwith a block\n{",
    "binary\n" + "\0" * 500, "\0" * 5000, '{"text": "a record"}\n', '{"text": "a rec',
]  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.csv is not a metrics file: its last line is b"):
        JsonLines(path).open(START)
    assert path.read_text() == text


def test_what_is_no_file_is_only_written_to() -> None:
    metrics = JsonLines("/dev/null")
    metrics.open(START)
    metrics.write({"step": 1})
    metrics.close()


def test_an_evaluation_that_the_file_ends_with_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = {"run_id": "run", "lineage": 1, "step": 4, "eval_bits_per_token": 2.0}
    for _ in range(2):
        metrics = JsonLines(path)
        metrics.open(START)
        metrics.write(line)
        metrics.write({**line, "step": 8})
        metrics.write({**line, "step": 4})
        metrics.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [4, 8, 4, 8, 4]
