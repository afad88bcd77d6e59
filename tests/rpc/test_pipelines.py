"""examples/pipelines/pipeline.py: killed at every boundary and started again, it exports the same model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fork_server
import pytest
from serving import ServerProcess

PIPELINE = Path(__file__).resolve().parents[2] / "examples" / "pipelines" / "pipeline.py"
TINY = {"model__num_tokens": "257", "model__mask_id": "256"}
STAGES = ["prepare", "train", "evaluate", "gate", "export"]
Serve = Callable[..., ServerProcess]

IN_A_FORK = """
import json, os, runpy, signal, sys
import maskwire.cli

kill_at, source, *arguments = sys.argv[1:]
pipeline = runpy.run_path(source, run_name="pipeline")
space = pipeline["main"].__globals__

def run(*words):
    "What the pipeline's own `run` does, with the command forked: an interpreter takes a second to start."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        sys.argv = ["maskwire", *words, "--json"]
        try:
            maskwire.cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 0)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        output = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ran", *words[:2], file=sys.stderr)
    if code:
        raise SystemExit(code)
    return json.loads(output)

def write(path, result, after=space["write"]):
    if kill_at == f"before {path.stem}":  # the stage's work is done, and not recorded
        os.kill(os.getpid(), signal.SIGKILL)
    after(path, result)
    if kill_at == f"after {path.stem}":
        os.kill(os.getpid(), signal.SIGKILL)

space.update(run=run, write=write)
sys.exit(pipeline["main"](arguments))
"""

SIGTERM_AT_START = """
import os, pathlib, runpy, signal, subprocess, sys, time

class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        while not pathlib.Path("started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Popen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose run every pipeline here brings to the same state."""
    server = ServerProcess(tmp_path_factory.mktemp("calm"), **TINY).start()
    yield server
    server.kill()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, count in (("texts", 12), ("held-out", 3)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_bytes(bytes(range(32, 127)) * 3 + bytes([40 + number]))
    return tmp_path


def arguments(texts: Path, work: str, **changed: object) -> list[str]:
    options = {
        "texts": texts / "texts", "held-out": texts / "held-out", "until-step": 6, "bound": 20, "length": 32,
        "batch-size": 4, "eval-rows": 8, "name": "pipeline", **changed,
    }  # fmt: skip
    return [str(texts / work), *(f"--{key}={value}" for key, value in options.items())]


def run(server: ServerProcess, given: list[str], kill_at: str = "") -> subprocess.CompletedProcess[str]:
    return fork_server.run(
        [sys.executable, "-c", IN_A_FORK, kill_at, str(PIPELINE), *given],
        text=True,
        env={**os.environ, **fork_server.ONE_THREAD, "MASKWIRE_TARGET": server.address},
    )


def records(work: Path) -> dict[str, Any]:
    return {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES}


def test_killed_at_every_boundary_it_exports_what_an_undisturbed_one_does(
    serve: Serve, calm: ServerProcess, texts: Path
) -> None:
    undisturbed = run(calm, arguments(texts, "calm"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert [json.loads(line)["stage"] for line in undisturbed.stdout.splitlines()] == STAGES
    rough, given = serve("rough", **TINY), arguments(texts, "rough")
    for name in STAGES:
        for moment in ("before", "after"):
            killed = run(rough, given, f"{moment} {name}")
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            assert (texts / "rough" / f"{name}.json").exists() is (moment == "after")
    finished = run(rough, given)
    assert (finished.returncode, "ran" in finished.stderr) == (0, False), "nothing was left to do"
    assert records(texts / "rough") == records(texts / "calm")
    weights = [(texts / work / "model" / "model.safetensors").read_bytes() for work in ("rough", "calm")]
    assert weights[0] == weights[1]
    with_more_steps = run(rough, arguments(texts, "rough", **{"until-step": 7}))
    assert (with_more_steps.returncode, "another until_step" in with_more_steps.stderr) == (2, True)


def test_a_closed_gate_exports_nothing_and_opens_with_another_bound(calm: ServerProcess, texts: Path) -> None:
    closed = run(calm, arguments(texts, "work", bound=0.5))
    assert closed.returncode == 10
    assert "exceed --bound 0.5" in closed.stderr
    assert not (texts / "work" / "model").exists()
    assert "ran" not in run(calm, arguments(texts, "work", bound=0.5)).stderr, "and costs nothing again"
    opened = run(calm, arguments(texts, "work"))
    assert opened.returncode == 0, opened.stderr
    for bound, code in ((0.5, 10), (19, 0)):
        again = run(calm, arguments(texts, "work", bound=bound))
        assert (again.returncode, "ran" in again.stderr) == (code, False), "each run checks its own bound"
    assert records(texts / "work")["gate"]["bound"] == 19
    beyond = run(calm, arguments(texts, "beyond", **{"until-step": 3}))
    assert (beyond.returncode, "is at step 6" in beyond.stderr) == (11, True)


# ---- the commands


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a stand-in for `maskwire` that a test writes to PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spec = importlib.util.spec_from_file_location("pipeline", PIPELINE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(tmp_path: Path, body: str) -> None:
    (tmp_path / "maskwire").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "maskwire").chmod(0o755)


def test_the_exit_code_of_a_command_is_the_pipeline_s(pipeline: ModuleType, tmp_path: Path) -> None:
    stand_in(tmp_path, """echo "{\\"words\\": \\"$*\\"}" """)
    assert pipeline.run("train", "data") == {"words": "train data --json"}
    for body, code in (("exit 3", 3), ("kill -9 $$", 137)):
        stand_in(tmp_path, body)
        with pytest.raises(SystemExit) as end:
            pipeline.run("train")
        assert end.value.code == code


def test_sigterm_while_a_command_starts_reaches_it(tmp_path: Path) -> None:
    """The signal comes when the command runs, and the pipeline does not know it yet."""
    stand_in(tmp_path, 'trap "exit 143" TERM; touch started; while :; do sleep 0.02; done')
    given = [str(PIPELINE), *arguments(tmp_path, "work")]
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM_AT_START, *given],
        cwd=tmp_path, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 143
    assert "pipeline: maskwire data ended with exit code 143" in done.stderr


def test_sigterm_stops_the_command_in_order(tmp_path: Path) -> None:
    stand_in(
        tmp_path, 'trap "echo drained >drained; exit 143" TERM; touch started; while :; do sleep 0.02; done'
    )
    given = arguments(tmp_path, "work")
    process = subprocess.Popen(
        [sys.executable, str(PIPELINE), *given], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert (tmp_path / "drained").exists()
    assert not (tmp_path / "work" / "prepare.json").exists()
