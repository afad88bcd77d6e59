"""The tutorials run as they are written, for fewer steps; docs/tutorial.py runs one at its stated sizes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))

from tutorial import TUTORIALS, Tutorial, TutorialError, blocks, missing

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a page in an empty folder; `shorter` are the words to replace."""

    def run_page(name: str, shorter: dict[str, str]) -> str:
        return Tutorial(name, tmp_path, shorter=shorter, start=fork_server.Process, threads=1).run()

    return run_page


def test_every_tutorial_has_a_test() -> None:
    tested = re.findall(r"run\(\s*\"([a-z-]+)\"", Path(__file__).read_text())
    assert sorted(tested) == sorted(path.stem for path in TUTORIALS.glob("*.md"))


def test_output_is_compared_but_for_numbers() -> None:
    assert missing("step 12  loss 3.4\nrun … done\n", "step 7 loss 1e-05\nrun 3f9a02bb of b: all done\n") == []
    assert missing("step 12  losses 3.4\n", "step 7 loss 1e-05\n") == ["step 12  losses 3.4"]


def test_a_page_that_prints_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutorial.TUTORIALS", tmp_path)
    (tmp_path / "page.md").write_text("```\necho one\n```\n```text\ntwo\n```\n")
    with pytest.raises(TutorialError, match="two"):
        Tutorial("page", tmp_path).run()
    with pytest.raises(TutorialError, match="does not contain 'three'"):
        Tutorial("page", tmp_path, shorter={"three": "four"})
    (tmp_path / "page.md").write_text("```\nfalse\n```\n")
    with pytest.raises(TutorialError, match="exit code 1"):
        Tutorial("page", tmp_path).run()


def test_blocks_come_in_order_and_the_text_stops_the_server() -> None:
    page = "```\na\n```\nStop the server.\n```python\nb\n```\n"
    assert blocks(page) == [("", "a\n"), ("stop", ""), ("python", "b\n")]


def test_addition(run: Run) -> None:
    said = run("addition", {"--until-step 2000": "--until-step 3"})
    training, held_out = map(int, re.findall(r"(\d+) sums to train on, (\d+) held out", said)[0])
    assert training + held_out == 90 * 90
    assert held_out == 501
    assert "step 3  loss" in said
    assert "\n12+34=" in said
    assert re.search(rf"\d% of {held_out} held-out sums are exact", said)
