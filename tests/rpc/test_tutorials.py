"""The tutorials run as they are written, for fewer steps; docs/tutorial.py runs one at its stated sizes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fork_server
import numpy as np
import pytest
from PIL import Image

from docs.tutorial import TUTORIALS, Tutorial, TutorialError, blocks, missing

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., str]
LONG = pytest.mark.skipif(
    "MASKWIRE_TUTORIALS" not in os.environ, reason="takes half a minute or more; `make docs` runs it"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a page in an empty folder; `shorter` are the words to replace."""

    def run_page(name: str, shorter: dict[str, str]) -> str:
        settings = ["serve.threads=1"]
        return Tutorial(name, tmp_path, shorter=shorter, start=fork_server.Process, settings=settings).run()

    return run_page


def test_every_tutorial_has_a_test() -> None:
    tested = re.findall(r"run\(\s*\"([a-z-]+)\"", Path(__file__).read_text())
    assert sorted({*tested}) == sorted(path.stem for path in TUTORIALS.glob("*.md"))


def test_output_is_compared_but_for_numbers() -> None:
    assert (
        missing("step 12  loss 3.4\nrun … done\n", "step 7 loss 1e-05\nrun 3f9a02bb of b: all done\n") == []
    )
    assert missing("step 12  losses 3.4\n", "step 7 loss 1e-05\n") == ["step 12  losses 3.4"]


def test_a_page_that_prints_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs.tutorial.TUTORIALS", tmp_path)
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


@LONG
@pytest.mark.timeout(1800)
def test_addition_is_learned_in_the_steps_of_its_page(run: Run) -> None:
    said = run("addition", {"--set model.dim=128 ": "--set run.seed=2 --set model.dim=128 "})
    exact = float(re.findall(r"([\d.]+)% of 501 held-out sums are exact", said)[0])
    assert exact >= 99.0
    assert "\n12+34=46" in said


def test_own_corpus(run: Run) -> None:
    pytest.importorskip("tokenizers")
    said = run(
        "own-corpus",
        {
            '"*.py"))[:200]': '"*.py"))[:24]',
            "vocab_size=2048": "vocab_size=300",
            "model.dim=64 ": "model.dim=32 ",
            "optimizer.total_steps=1500": "optimizer.total_steps=200",
            "--until-step 1500": "--until-step 6",
            "--eval-every 250 --checkpoint-every 500": "--eval-every 3 --checkpoint-every 3",
            "--rows 256": "--rows 4",
        },
    )
    assert re.findall(r"step (\d): [\d.]+ bits per token on held-out text", said) == ["3", "6"]
    assert "bits per byte" in said
    assert re.search(r"\nimport os", said)
    assert len(re.findall(r"\ndef .*\(self\):", said)) == 2
    probabilities = [float(found) for found in re.findall(r"^([01]\.\d{3}) '", said, re.MULTILINE)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)


@LONG
def test_fine_tune_bert(run: Run, preloaded: None) -> None:
    said = run(
        "fine-tune-bert",
        {
            "pairs[320:]": "pairs[4200:]",
            "pairs[:320]": "pairs[:40]",
            "--until-step 600": "--until-step 4",
            "--eval-every 200": "--eval-every 2",
        },
    )
    assert len(re.findall(r"step 4: held out ", said)) == 2, "the whole model's run, and that of the adapters"
    assert re.search(r"\d% of 40 held-out answers are right", said)
    parameters, frozen = re.findall(r"parameters +([\d,]+), ([\d,]+) frozen", said)[0]
    assert int(parameters.replace(",", "")) > int(frozen.replace(",", "")) > 100_000


def test_image_tokens(run: Run, tmp_path: Path) -> None:
    run(
        "image-tokens",
        {
            "count, size, patch, codes = 4000": "count, size, patch, codes = 300",
            "20000": "2000",
            "range(12)": "range(2)",
            "--until-step 800": "--until-step 4",
            "--eval-every 200": "--eval-every 4",
            "dim = 128": "dim = 32",
        },
    )
    generated = np.load(tmp_path / "generated.npy")
    assert generated.shape == (16, 64)
    assert generated.max() < 64, "the mask id is never sampled"
    with Image.open(tmp_path / "pictures.png") as picture:
        assert picture.size == (16 * 68, 3 * 68)
        book, tokens = np.load(tmp_path / "book.npy"), np.load(tmp_path / "held-out.npy")
        first = book[tokens[0, 0]].reshape(4, 4, 3)[0, 0].round()
        assert np.asarray(picture)[68 + 2, 2].tolist() == first.tolist(), (
            "the second row is drawn from tokens"
        )


def test_infilling(run: Run) -> None:
    said = run(
        "infilling",
        {"< 3000": "< 60", "--until-step 1000": "--until-step 4", "model.dim=64 ": "model.dim=32 "},
    )
    assert len(re.findall(r"\non .* anna buys 3 plums and .* nuts, 5 in all\.", said)) == 3
    masked = [int(found) for found in re.findall(r"on friday carla buys [^\0]{19}, 4 in all\. (\d+)", said)]
    assert masked == [12, 6, 3, 0], "19 (1 - t)^2, rounded down, at t = 1/5 to 4/5"
    nats = [float(found) for found in re.findall(r"^ *([\d.]+) nats  on sunday ", said, re.MULTILINE)]
    assert len(nats) == 4
    assert nats == sorted(nats)


@LONG
def test_cluster(run: Run, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    said = run("cluster", {})
    assert said.count("step 20  loss") == 1, "the second command trains nothing"
    assert (tmp_path / "secrets" / "ca.key").exists()


def test_gpu(run: Run) -> None:
    said = run(
        "gpu",
        {
            'device = "cuda" ': 'device = "cpu" ',
            'compile = "default" ': 'compile = "off" ',
            "dim = 768\ndepth = 12\nheads = 12": "dim = 32\ndepth = 1\nheads = 2",
            "50, 512, 256": "5, 4, 256",
        },
    )
    assert re.search(r"precision +fp32\n", said)
    assert re.search(r"[\d,]+ tokens/s; the device computed \d+% of the time", said)


@LONG
def test_sizing(run: Run) -> None:
    said = run("sizing", {"every_steps=100": "every_steps=10", "until_step=450": "until_step=45"})
    per_parameter = [float(found) for found in re.findall(r"bytes, ([\d.]+) per parameter", said)]
    assert len(per_parameter) == 3, "keep_last"
    assert all(12 <= each < 12.2 for each in per_parameter), "weights and two moments in fp32"
    steps, kept, batch = map(int, re.findall(r"(\d+) steps, the batches of (\d+) kept, (\d+) bytes", said)[0])
    assert (steps, kept) == (45, 5), "those that the two newest checkpoints do not cover"
    assert 16 * 64 <= batch < 16 * 64 + 64, "a byte for each id"
    assert "the same run, step and digest" in said
    assert len(re.findall(r"is at step 45 ", said)) == 3, "after the upgrade and after going back too"
