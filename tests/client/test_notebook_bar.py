"""The bar of a notebook, drawn through IPython's display."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from counting_trainer import Counting, Numbered, evaluation, fit

from maskwire.loggers.notebook_bar import NotebookBar, in_notebook


class Display:
    """As much of IPython as the bar uses."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.updates: list[str] = []
        self.broken = False

    def display(self, content: str, display_id: bool) -> Any:
        assert display_id
        self.first.append(content)
        return self

    def update(self, content: str) -> None:
        if self.broken:
            raise RuntimeError("the page was closed")
        self.updates.append(content)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Display:
    made, ipython, module = Display(), ModuleType("IPython"), ModuleType("IPython.display")
    module.display, module.HTML = made.display, str  # type: ignore[attr-defined]
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return made


def test_a_notebook_shows_one_bar_that_is_drawn_again(
    shown: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Counting(), Numbered(), until_step=6, evaluate=evaluation, eval_every=3)
    (first,) = shown.first
    assert 'value="0" max="6"' in first
    last = shown.updates[-1]
    assert 'value="6" max="6"' in last
    assert "step 6/6 loss 0.1667" in last
    assert last.count("<br>step 3: held out 2.000 ± 0.144 bits per token") == 1
    assert capsys.readouterr() == ("", ""), "and nothing else"


def test_text_is_escaped_and_old_lines_are_left_out(shown: Display) -> None:
    bar = NotebookBar(0, 10, lambda: 1.0)
    for number in range(30):
        bar.say(f"<b>{number}</b>")
    assert "<b>" not in shown.updates[-1]
    assert [f";{number}&lt;/b&gt;" in shown.updates[-1] for number in (8, 12, 29)] == [False, True, True]


def test_a_page_that_was_closed_costs_no_step(shown: Display) -> None:
    shown.broken = True
    assert fit(Counting(), Numbered(), until_step=6).step == 6


def test_ipython_on_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()
