"""What `verify`, `inspect` and `replay` say of a run directory, whole and damaged."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from counter import CounterTrainer
from rig import DIGEST, make_engine

from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import RunDirectoryError
from maskwire_server.recovery import verify
from maskwire_server.recovery.state_at_step import rewind
from maskwire_server.requests import RestoreRequest, SaveRequest, StepRequest

WAIT = 20
WHOLE = config.load(None, serve={"keep_payloads": "all"}, checkpoints={"every_seconds": 1e6})
SERVER = str(Path(sys.executable).with_name("maskwire-server"))


def engine(folder: Path) -> Engine:
    made = make_engine(folder, WHOLE)
    made.wait_serving(WAIT)
    return made


def batch(seed: int) -> Payload:
    return Payload(Batch(np.random.default_rng(seed).integers(10, 200, (2, 8)), 2, 8), Modes())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Ten steps, a restore to step 4, and five more."""
    folder = tmp_path / "run"
    running = engine(folder)
    for seed in range(4):
        running.train_step(StepRequest(batch(seed), request_id=f"r{seed}")).result(WAIT)
    running.save(SaveRequest("four")).result(WAIT)
    for seed in range(4, 10):
        running.train_step(StepRequest(batch(seed))).result(WAIT)
    running.restore(RestoreRequest("four")).result(WAIT)
    for seed in range(20, 25):
        running.train_step(StepRequest(batch(seed))).result(WAIT)
    running.close()
    return folder


def change(run_dir: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(run_dir / "journal.sqlite") as database:
        assert database.execute(statement, values).rowcount
    database.close()


def test_a_whole_run_has_no_problems(run_dir: Path) -> None:
    found = verify.verify(run_dir)
    assert found.problems == []
    assert (found.lineages, found.lineage, found.step, found.steps, found.batches) == (2, 2, 9, 15, 15)
    assert found.checkpoints == ["step-000000004-lineage-2", "four", "step-000000000"]


@pytest.mark.parametrize(
    ("statement", "values", "words"),
    [
        ("UPDATE steps SET numbers = ? WHERE lineage = 2 AND step = 7", (bytes(33),), "step 7 .*its hash"),
        ("DELETE FROM steps WHERE lineage = 2 AND step = 7", (), "step 7 .*is missing"),
        ("DELETE FROM steps WHERE lineage = 1 AND step = 4", (), "step 4 .*is missing"),
        ("UPDATE payloads SET payload = ? WHERE lineage = 2 AND step = 6", (b"junk",), "step 6 .*damaged"),
        ("DELETE FROM payloads WHERE lineage = 2 AND step = 6", (), "batch of step 6 .*was dropped"),
    ],
)
def test_each_kind_of_damage_is_named(
    run_dir: Path, statement: str, values: tuple[Any, ...], words: str
) -> None:
    change(run_dir, statement, *values)
    problems = verify.verify(run_dir).problems
    assert any(re.search(words, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE lineages SET digest = x'00' WHERE lineage = 2", "lineage 2 does not match its hash"),
        ("UPDATE run SET value = 5 WHERE key = 'seed'", "the run's identity does not match its hash"),
    ],
)
def test_damage_that_nothing_can_be_read_behind_is_said(run_dir: Path, statement: str, words: str) -> None:
    change(run_dir, statement)
    with pytest.raises(RunDirectoryError, match=words):
        verify.verify(run_dir)


def test_a_damaged_checkpoint_is_named_and_one_before_it_counts(run_dir: Path) -> None:
    state = run_dir / "checkpoints" / "four" / "state.json"
    state.write_text(state.read_text() + " ")
    found = verify.verify(run_dir)
    assert found.problems == ["checkpoint four: state.json: does not match the manifest's size and SHA-256"]
    assert found.checkpoints == ["step-000000004-lineage-2", "step-000000000"]


def test_a_step_is_shown_as_it_was_recorded(run_dir: Path) -> None:
    found = verify.inspect(run_dir, 3)
    assert (found.record.lineage, found.record.request_id) == (1, "r2")
    assert found.payload is not None
    assert found.payload.hash(DIGEST) == batch(2).hash(DIGEST)
    assert found.settings["optimizer.learning_rate"] == 1e-3
    assert verify.inspect(run_dir, 6).record.lineage == 2, "of the current history"
    assert verify.inspect(run_dir, 6, lineage=1).record.payload_hash == batch(5).hash(DIGEST)
    with pytest.raises(RunDirectoryError, match=r"no step 99 .*the run's last step is 9"):
        verify.inspect(run_dir, 99)
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        verify.inspect(run_dir.parent, 1)


OF_RUN: dict[str, Any] = {"seed": WHOLE.run.seed, "canonical": WHOLE.canonical()}


def test_any_step_can_be_computed_again_beside_the_run(run_dir: Path, tmp_path: Path) -> None:
    whole = WHOLE.model_dump(mode="json")
    before = sorted((run_dir / "checkpoints").iterdir())
    for step in (0, 2, 4, 7, 9):
        out = tmp_path / f"at-{step}"
        info, inexact = rewind(run_dir, CounterTrainer, whole, **OF_RUN, to_step=step, out=out)
        assert inexact == 0
        record = None if step == 0 else verify.inspect(run_dir, step).record
        assert record is None or info.digest == record.digest
        again = json.loads((out / "state.json").read_text())["state"]
        if record is not None:
            assert int(again[:12], 16) / 2**48 == record.losses.loss, "the state after just that step"
    assert sorted((run_dir / "checkpoints").iterdir()) == before
    for step, out, words in ((10, None, "no step 10"), (3, tmp_path / "at-2", "exists")):
        with pytest.raises(RunDirectoryError, match=words):
            rewind(run_dir, CounterTrainer, whole, **OF_RUN, to_step=step, out=out)
    assert verify.verify(run_dir).problems == []


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return fork_server.run([SERVER, *map(str, arguments)], text=True)


def test_the_commands_say_it_in_words_and_json(run_dir: Path, tmp_path: Path) -> None:
    found = command("verify", "--run-dir", run_dir)
    assert found.returncode == 0
    assert "nothing is damaged" in found.stdout
    assert json.loads(command("verify", "--run-dir", run_dir, "--json").stdout)["step"] == 9
    shown = command("inspect", 3, "--run-dir", run_dir, "--out", tmp_path / "batch.npy")
    assert "APPLIED" in shown.stdout
    assert "row 1:" in shown.stdout
    assert np.array_equal(np.load(tmp_path / "batch.npy"), batch(2).batch.ids)
    step = json.loads(command("inspect", 3, "--run-dir", run_dir, "--json").stdout)
    assert (step["request_id"], step["batch"]["rows"]) == ("r2", 2)
    missing = command("inspect", 99, "--run-dir", run_dir)
    assert (missing.returncode, "no step 99" in missing.stderr) == (3, True)
    running = engine(run_dir)
    busy = command("verify", "--run-dir", run_dir)
    running.close()
    assert (busy.returncode, "uses this run directory" in busy.stderr) == (3, True)
    change(run_dir, "DELETE FROM steps WHERE lineage = 2 AND step = 7")
    damaged = command("verify", "--run-dir", run_dir)
    assert (damaged.returncode, "is missing" in damaged.stdout) == (1, True)
