"""The demo: its recipe, its 4-gram model of bytes, and its report."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from bench import recipe
from demo import __main__ as demo
from demo import report
from demo.fourgram import FourGram
from demo.generating import Writing
from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server.cli.init import RECIPE


def test_probabilities_are_those_computed_by_hand() -> None:
    model = FourGram([b"aab"])
    # Behind nothing: a twice, b once, N = 3, T = 2 kinds. Behind a: a and b once each, N = 2, T = 2.
    a = (2 + 2 / 256) / (3 + 2)
    assert model.probability(b"", ord("a")) == pytest.approx(a)
    assert model.probability(b"a", ord("a")) == pytest.approx((1 + 2 * a) / (2 + 2))
    assert model.bits_per_byte([b"aa"]) == pytest.approx(-(math.log2(a) + math.log2((1 + 2 * a) / 4)) / 2)


@pytest.mark.parametrize("history", [b"", b"a", b"bra", b"zzz", b"rab"])
def test_probabilities_add_up_to_one(history: bytes) -> None:
    model = FourGram([b"abracadabra" * 3, b"", b"\x00\xff"])
    assert sum(model.probability(history, byte) for byte in range(256)) == pytest.approx(1)


def test_text_that_resembles_the_text_needs_fewer_bits() -> None:
    model = FourGram([b"the cat sat on the mat. " * 50])
    assert model.bits_per_byte([b"the mat sat on"]) < 2
    assert model.bits_per_byte([bytes(range(100, 200))]) > 8


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report of made-up figures, with text that would end a script or open a tag."""
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.py").write_bytes(f"for i in range({number}): print(i)\n".encode() * 40)
    training, held_out = ByteData(source, length=16, batch_size=2).split(0.3)
    writing = Writing(training, held_out, 16)
    writing.frames = ["░░░", "a░░", "a<░", "a<b"]
    writing.texts = ["</script><script>alert(1)</script>", "x & y"]
    writing.filled = ("if a <b> ", "was", "now", " & c")
    figures = dict.fromkeys(report.FIGURES, 1) | {"seconds_training": 120.0, "steps": 1234}
    curve = tmp_path / "curve.png"
    curve.write_bytes(b"\x89PNG")
    report.write(figures, writing, curve, tmp_path / "report.html")
    return tmp_path / "report.html"


def test_the_report_needs_no_other_file_and_shows_text_as_text(page: Path) -> None:
    text = page.read_text()
    assert "$" not in text.replace("${", "")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^"' >]+""", text)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert '<pre>if a &lt;b&gt; <span class="filled">now</span> &amp; c</pre>' in text
    frames = re.search(r'<script type="application/json" id="frames">(.*?)</script>', text)
    assert frames is not None
    assert json.loads(frames[1]) == ["░░░", "a░░", "a<░", "a<b"]
    assert "1,234 steps" in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_plays_the_unmasking_to_its_end(page: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert '<span id="count" class="muted">pass 3 of 3</span>' in found.stdout
    assert '<span class="">a</span><span class="">&lt;</span><span class="new">b</span></pre>' in found.stdout


def test_the_demo_trains_the_best_recipe_and_init_writes_its_settings() -> None:
    settings = tomllib.loads(demo.CONFIG)
    best = recipe.ARMS["best"]
    assert {**settings["model"], **best.model} == settings["model"]
    assert settings["objective"] == best.objective
    assert settings["optimizer"] == {"ema_decay": 0.99, **best.optimizer}
    assert (best.rows, best.rate) == (demo.ROWS, demo.PEAK_RATE)
    for section, values in RECIPE.items():
        assert values.items() <= settings[section].items(), section


def test_the_learning_rate_falls_from_its_peak_to_almost_zero() -> None:
    rates = [demo.falling(step, 1000) for step in range(demo.PROBE_STEPS, 1001)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == demo.PEAK_RATE
    assert demo.falling(520, 999) == pytest.approx(demo.PEAK_RATE / 2)
    assert 0 < rates[-1] < 1e-5 * demo.PEAK_RATE


def test_the_test_files_of_the_recipes_are_those_that_the_demo_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{number}.py" for number in range(300)]
    for number, file in enumerate(files):
        file.write_text(f"print({number})\n" * 10)
    for module in (demo, recipe):
        monkeypatch.setattr(module, "python_sources", lambda: files)
    _, demos = demo.sources()
    validation, test = recipe.held_out(test=False).files, recipe.held_out(test=True).files
    assert test == demos.files
    assert len(validation) > 5
    assert not set(validation) & set(test)


@pytest.mark.parametrize(
    ("decay", "shares"),
    [("cosine", (0.4, 1, 0.5, 0)), ("linear", (0.4, 1, 0.5, 0)), ("last fifth", (0.4, 1, 1, 0.25))],
)
def test_the_learning_rate_of_a_recipe_follows_the_time(decay: str, shares: tuple[float, ...]) -> None:
    assert [recipe.share(decay, p) for p in (0.02, 0.05, 0.525, 1.0)] == pytest.approx(shares)


def test_ratios_of_recipes_are_of_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PAGE", tmp_path / "recipe.md")
    recipe.PAGE.write_text(f"before\n{recipe.BEGIN}old\n{recipe.END}after\n")
    run = {"steps": 10, "parameters": 1000}
    recipe.write_tables(
        {
            "test, 9 s, seed 0: best": {**run, "bits": 1.0},
            "test, 9 s, seed 1: before": {**run, "bits": 4.0},
            "test, 9 s, seed 1: best": {**run, "bits": 3.0},
        }
    )
    text = recipe.PAGE.read_text()
    assert "| best | 2.000 (2 seeds) | 0.750 | 10 | 1,000 |\n| before | 4.000 | 1.000 | 10 | 1,000 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_the_text_is_found_without_a_message(caplog: pytest.LogCaptureFixture) -> None:
    files = python_sources()
    assert len(files) > 300
    assert all(path.stat().st_size for path in files)
    assert caplog.messages == []
