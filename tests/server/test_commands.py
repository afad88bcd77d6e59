"""What the commands of `maskwire-server` that read a run or prepared data print, and what they refuse."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from counter import CounterTrainer
from rig import WAIT, Rig
from typer.testing import CliRunner

from maskwire.v1.values import Losses
from maskwire_server import app, cli
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.cli import app as commands
from maskwire_server.config import load
from maskwire_server.journal.run_directory import JOURNAL_FILE
from maskwire_server.requests import StepRequest
from maskwire_server.results import StepResult


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(each) for each in arguments])


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], count: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == count


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A command adds a handler to the root logger."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.parametrize(
    ("metadata", "settings"),
    [
        ({}, {"max_seq_len": 512, "pad_id": None}),
        ({"pad_id": 3}, {"max_seq_len": 512, "pad_id": 3}),
        ({"row_length": 64, "prompts": True, "longest": 40}, {"max_seq_len": 64}),
        ({"prompts": True, "longest": 40}, {"max_seq_len": 40}),
        ({"prompts": True, "longest": 4000}, {"max_seq_len": 512}),
        ({"longest": 40}, {"max_seq_len": 512}),  # rows of text are cropped to the row length
    ],
    ids=str,
)
def test_a_new_configuration_fits_prepared_data(
    tmp_path: Path, metadata: dict[str, Any], settings: dict[str, Any]
) -> None:
    metadata = {"num_tokens": 30, "mask_id": 29, **metadata}
    (tmp_path / "maskwire-data.json").write_text(json.dumps(metadata))
    done = run("init", tmp_path / "c.toml", "--data", tmp_path)
    assert done.exit_code == 0, done.stderr
    model = load(tmp_path / "c.toml").model
    assert (model.num_tokens, model.mask_id) == (30, 29)
    assert {name: getattr(model, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--data must be a folder written by `maskwire data prepare`, but there is no file"),
        ("{", "maskwire-data.json: cannot be read (Expecting property name"),
        ("[]", "maskwire-data.json: cannot be read (list indices must be"),
        ('{"num_tokens": 30}', "maskwire-data.json: cannot be read ('mask_id'); prepare the data again"),
        ('{"num_tokens": 30, "mask_id": "x"}', "maskwire-data.json: cannot be read (invalid literal for int"),
    ],
    ids=str,
)
def test_data_that_cannot_be_read_leaves_no_configuration(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "maskwire-data.json").write_text(content)
    done = run("init", tmp_path / "c.toml", "--data", tmp_path)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "c.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "--to", 0, "--set", "model.depth"], "--set must be SECTION.KEY=VALUE, got 'model.depth'"),
        (["replay", "--to", 0, "--set", "depth=1"], "--set must be SECTION.KEY=VALUE, got 'depth=1'"),
        (
            ["replay", "--to", 0, "--set", "model.lora=1", "--set", "model.lora.rank=2"],
            "--set model.lora.rank: lora was set to a value before, and cannot have keys",
        ),
        (
            ["replay", "--to", 0, "--log-level", "loud"],
            "--log-level must be debug, info, warning or error, got 'loud'",
        ),
        (
            ["export", "out", "--folder", "a", "--run-dir", "b"],
            "--folder names the checkpoint; leave out --run-dir and --checkpoint",
        ),
        (
            ["export", "out", "--folder", "a", "--checkpoint", "b"],
            "--folder names the checkpoint; leave out --run-dir and --checkpoint",
        ),
        (["export", "out"], "--run-dir must be set, or --folder for a downloaded checkpoint"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(arguments: list[object], words: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stderr) == (2, f"maskwire-server: {words}\n")


IDS = np.arange(10 * 30).reshape(10, 30) % 200 + 10


@pytest.fixture
def trained(rig: Rig) -> Path:
    """A run of three steps of the counting trainer."""
    engine = rig.start()
    for step in range(3):
        payload = Payload(Batch(IDS + step, 10, 30), Modes())
        engine.train_step(StepRequest(payload, request_id=f"r{step}")).result(WAIT)
    engine.close()
    return rig.folder


def drop_batch(run_dir: Path, step: int) -> None:
    """As the server does after a checkpoint."""
    with closing(sqlite3.connect(run_dir / JOURNAL_FILE)) as db, db:
        assert db.execute("DELETE FROM payloads WHERE step = ?", (step,)).rowcount == 1


def test_a_step_is_shown_with_the_beginning_of_its_batch(trained: Path, tmp_path: Path) -> None:
    shown = run("inspect", 2, "--run-dir", trained, "--out", tmp_path / "ids.npy")
    assert shown.exit_code == 0, shown.stderr
    assert "request_id      r1\n" in shown.stdout
    for row in (0, 7):
        text = " ".join(str(value) for value in (IDS + 1)[row, :24])
        assert f"  row {row}: {text} …\n" in shown.stdout
    assert "row 8:" not in shown.stdout
    assert shown.stdout.endswith("  … 2 more rows (write all with --out FILE.npy)\n")
    assert (np.load(tmp_path / "ids.npy") == IDS + 1).all()


def test_a_step_whose_batch_was_deleted_is_shown_without_it(trained: Path, tmp_path: Path) -> None:
    drop_batch(trained, 1)
    shown = run("inspect", 1, "--run-dir", trained)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.endswith(
        "batch           deleted after a checkpoint (serve.keep_payloads = 'all' keeps batches)\n"
    )
    assert json.loads(run("inspect", 1, "--run-dir", trained, "--json").stdout)["batch"] is None
    refused = run("inspect", 1, "--run-dir", trained, "--out", tmp_path / "ids.npy")
    assert refused.exit_code == 2
    assert "step 1's batch was deleted after a checkpoint; serve.keep_payloads = 'all'" in refused.stderr
    assert not (tmp_path / "ids.npy").exists()


def test_a_batch_that_cannot_be_written_is_said_with_the_reason(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "missing" / "ids.npy"
    done = run("inspect", 1, "--run-dir", trained, "--out", out)
    assert (done.exit_code, done.stderr) == (
        2,
        f"maskwire-server: --out: {out} cannot be written (No such file or directory); choose another file\n",
    )


class Wrong(CounterTrainer):
    """Another device, with other losses."""

    def train_step(self, *arguments: Any) -> StepResult:
        result = super().train_step(*arguments)
        return StepResult(result.outcome, Losses(9.0, 9.0), result.gradient_norm, 1e-3, 1, 2)


@pytest.mark.parametrize(
    ("trainer", "arguments", "code", "words"),
    [
        (CounterTrainer, ["--to", 3], 0, r"step 3, digest [0-9a-f]{64}: as recorded\n"),
        (CounterTrainer, ["--to", 2, "--out", "OUT"], 0, r": as recorded; its state is in .*OUT\n"),
        (CounterTrainer, ["--to", 4], 3, "the run's history has no step 4"),
        (CounterTrainer, ["--to", 3, "--out", "."], 3, "exists already; choose a new folder with --out"),
        (CounterTrainer, ["--to", 3, "--set", "run.seed=5"], 3, "run.seed is 0 in the run, but 5 in the"),
        (CounterTrainer, ["--to", 3, "--set", "model.source=python"], 2, "model.python.factory must be set"),
        (Wrong, ["--to", 3], 4, "step 1 computed again gave loss 9.0, but 0.4"),
        (Wrong, ["--to", 3, "--accept-inexact-replay"], 0, "3 steps gave other losses than recorded"),
    ],
    ids=["exact", "out", "step", "exists", "seed", "config", "inexact", "accepted"],
)
def test_a_replay_says_by_its_exit_code_what_came_of_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    trainer: type[CounterTrainer], arguments: list[object], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(app, "build_trainer", lambda _: trainer())
    monkeypatch.chdir(tmp_path)
    before = (trained / JOURNAL_FILE).read_bytes()
    done = run("replay", "--run-dir", trained, *arguments)
    assert done.exit_code == code, done.output
    assert re.search(words, done.output)
    assert (trained / JOURNAL_FILE).read_bytes() == before
    assert (tmp_path / "OUT" / "manifest.json").exists() is ("OUT" in arguments)


def test_a_replay_of_no_run_is_refused_and_makes_none(tmp_path: Path) -> None:
    done = run("replay", "--run-dir", tmp_path / "none", "--to", 1)
    assert done.exit_code == 3, done.output
    assert "none" in done.stderr
    assert not (tmp_path / "none").exists()
