"""A run with a masking schedule of the user's own, through a real server."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire_server

Serve = Callable[..., ServerProcess]
GOOD = "def cubic(t):\n    return (1 - t) ** 3\n"
NAME = "my_schedules.mine:cubic"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the schedule, in a package in the current folder."""
    file = tmp_path / "my_schedules" / "mine.py"
    file.parent.mkdir()
    file.write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return file


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (4, 16))


def test_a_run_trains_is_killed_and_goes_on_with_the_users_schedule(
    serve: Serve, code: Path, tmp_path: Path
) -> None:
    server = serve(objective__schedule=NAME, checkpoints__every_seconds="1e6")
    with maskwire.connect(server.address) as trainer:
        losses = [trainer.train_step(tokens(seed)).losses.loss for seed in range(6)]
        digest = trainer.digest
        model = trainer.status().model
        assert model is not None
        assert f"{NAME} schedule" in model.objective
        assert model.loss_is_bound
        found = trainer.eval_loss(tokens(9), draws=4)
        assert np.isfinite([*losses, found.nats_per_token]).all()
        # floor((1 - s/4)^3 * 16) positions stay masked after pass s of 4.
        states = list(trainer.generate_steps(count=1, length=16, steps=4))
        assert [state.still_masked for state in states] == [(6,), (2,), (0,)]
    server.kill()
    with closing(sqlite3.connect(server.folder / "run" / "journal.sqlite")) as journal:
        ((canonical,),) = journal.execute("SELECT value FROM run WHERE key = 'canonical'").fetchall()
    record = json.loads(canonical)["objective"]
    assert record["schedule"] == NAME
    assert len(record["schedule_sha256"]) == 64

    server.start()
    assert "replayed 6 steps" in server.log.read_text()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (6, digest)
        assert trainer.eval_loss(tokens(9), draws=4).nats_per_token == found.nats_per_token
        saved = trainer.checkpoint("kept")
    server.stop()

    folder = server.folder / "run" / "checkpoints" / saved.name
    code.write_text("def cubic(t):\n    return 1 - t ** 3\n")
    for command in ("serve", "check"):
        words = [server._command[0], command, *server._command[2:]]
        refused = fork_server.run(words, text=True)
        assert refused.returncode == 3, refused.stderr
        assert f"objective.schedule: the function {NAME!r} is not the one that the run in" in refused.stderr
        assert record["schedule_sha256"] in refused.stderr
        assert refused.stderr.count("maskwire-server:") == 1
    unnamed = [word for word in server._command if "objective.schedule" not in word]
    refused = fork_server.run(unnamed, text=True)
    assert refused.returncode == 2
    assert "the server imports code only if its own configuration names it" in refused.stderr
    other = [*unnamed, "--set=objective.schedule=linear"]
    refused = fork_server.run(other, text=True)
    assert refused.returncode == 3
    assert f"objective.schedule is '{NAME}' in the run, but 'linear' in the configuration" in refused.stderr

    code.unlink()
    module = maskwire_server.load(folder)
    assert module.objective.schedule == NAME, "weights are used without the code of the schedule"


WRONG = {
    "def cubic(t):\n    return 1 - t / 2\n": f"objective.schedule: {NAME} must mask nothing at time 1",
    "def cubic(t):\n    return t\n": f"objective.schedule: {NAME} must mask everything at time 0",
    "def square(t):\n    return t\n": f"objective.schedule: {NAME!r} cannot be imported: module ",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_schedule_is_refused_before_anything_is_written(
    code: Path, tmp_path: Path, text: str
) -> None:
    code.write_text(text)
    server = ServerProcess(tmp_path / "a", objective__schedule=NAME)
    for command in ("serve", "check"):
        refused = fork_server.run([server._command[0], command, *server._command[2:]], text=True)
        assert refused.returncode == 2, refused.stderr
        assert WRONG[text] in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "a" / "run").exists()


def test_check_names_the_schedule_and_its_fingerprint(code: Path, tmp_path: Path) -> None:
    assert code.exists()
    server = ServerProcess(tmp_path / "a", objective__schedule=NAME)
    done = fork_server.run([server._command[0], "check", *server._command[2:]], text=True)
    assert done.returncode == 0, done.stderr
    assert f"{NAME}, SHA-256 " in done.stdout
