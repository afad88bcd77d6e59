"""A command whose output is lost still does its work and ends with the right exit code."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rpc"))

from serving import ServerProcess

import maskwire.cli.display
from maskwire.cli import app, exit_codes
from maskwire.client import run_fit
from maskwire.nonfatal_output import tell
from maskwire.protocol.fit import FitResult
from maskwire.protocol.fit import fit as training_loop

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COUNTING = [sys.executable, str(ROOT / "tests" / "rpc" / "counting_server.py"), "0"]
DISPLAY = "±…─é"


def fit(trainer: Any, data: Any, **options: Any) -> FitResult:
    return run_fit(trainer, training_loop(trainer, data, **options))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = ServerProcess(
        tmp_path_factory.mktemp("output"), COUNTING, model__num_tokens="257", model__mask_id="256"
    ).start()
    yield made
    assert made.stop() == 0


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    path.write_text("some text about nothing in particular " * 40)
    return path


def command(
    *arguments: object, closed: tuple[int, ...] = (), **options: Any
) -> subprocess.CompletedProcess[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    if closed or "env" in options:  # these need a fresh interpreter
        return subprocess.run(closing(closed, words), timeout=100, check=False, **options)
    return fork_server.run(words, **options)


def closing(descriptors: tuple[int, ...], words: list[str]) -> list[str]:
    """The command, run with these file descriptors closed.

    A shell closes them: a `preexec_fn` forks the interpreter, which aborts if gRPC is busy in another thread.
    """
    return ["sh", "-c", " ".join(['exec "$0" "$@"', *(f"{each}>&-" for each in descriptors)]), *words]


def train(server: ServerProcess, text: Path, until: int, *arguments: object) -> list[object]:
    return ["maskwire", "train", text, "--target", server.address, "--until-step", until, "--length", 16,
            "--batch-size", 2, "--allow-changed-data", *arguments]  # fmt: skip


def step(server: ServerProcess) -> int:
    found: int = json.loads(command("maskwire", "status", "-t", server.address, "--json").stdout)["step"]
    return found


ENCODINGS: dict[str, dict[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_results_are_printed_in_every_encoding(server: ServerProcess, text: Path, name: str) -> None:
    env = {**os.environ, **ENCODINGS[name]}
    for arguments, words in (
        (["maskwire", "eval", text, "--rows", 2, "--length", 16, "-t", server.address], b"bits per token"),
        (["maskwire", "data", "prepare", text, "--out", text.parent / f"é {DISPLAY} {name}"], b"num_tokens"),
    ):
        done = command(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        done.stdout.decode("cp1252" if name == "cp1252" else "ascii")


def test_samples_that_cannot_be_encoded_are_replaced(server: ServerProcess) -> None:
    arguments = ["maskwire", "generate", "-t", server.address, "--prompt", "é~", "--row-seed", 97]
    whole = command(*arguments, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert whole.stdout.decode().startswith("é")
    done = command(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, whole.stdout.decode().encode("ascii", "replace"))


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_closed_file_descriptors_do_not_affect_training(
    server: ServerProcess, text: Path, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    until, metrics = step(server) + 2, tmp_path / "metrics.jsonl"
    done = command(*train(server, text, until, "--metrics", metrics), closed=closed)
    assert (done.returncode, step(server)) == (0, until)
    if 1 not in closed:
        assert done.stdout.startswith(f"step {until}".encode())
        assert b"tokens/s  0 s left" not in done.stdout, "progress belongs on stderr"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "outcome" in line] == [until - 1, until], "and no other lines"


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")], ids="+".join)
def test_a_closed_pipe_does_not_affect_the_command(
    server: ServerProcess, text: Path, streams: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    pipes = dict.fromkeys(streams, writing)
    try:
        until = step(server) + 1
        for arguments in (
            train(server, text, until),
            ["maskwire", "status", "--watch", "-t", server.address],
            ["maskwire", "--help"],
        ):
            done = command(*arguments, **pipes)
            assert done.returncode == 0, (arguments, done)
            if "stderr" not in streams and arguments[1:2] != ["train"]:
                assert done.stderr == b"", arguments
        assert step(server) == until
        refused = command("maskwire", "status", "-t", "127.0.0.1:1", "--retry-for", 0.1, **pipes)
        assert refused.returncode == 3, "a failure keeps its exit code"
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_has_its_own_exit_code(server: ServerProcess, text: Path) -> None:
    until = step(server) + 1
    with Path("/dev/full").open("w") as full:
        for arguments in (
            train(server, text, until),
            ["maskwire", "--help"],
        ):
            done = command(*arguments, stdout=full)
            assert done.returncode == 7, done.stderr
            assert b"could not be written to stdout (No space left on device)" in done.stderr
            assert b"Traceback" not in done.stderr
        done = command("maskwire", "status", "-t", server.address, "--json", stdout=full)
        assert json.loads(done.stderr)["exit_code"] == 7
        assert (
            command("maskwire", "status", "-t", "127.0.0.1:1", "--retry-for", 0.1, stderr=full).returncode
            == 3
        )
    assert step(server) == until


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_loses_no_step(server: ServerProcess, text: Path) -> None:
    until = step(server) + 5
    done = command(*train(server, text, until, "--metrics", "/dev/full", "--json"))
    assert done.returncode == 7
    result = json.loads(done.stdout)
    assert (result["step"], result["steps"], step(server)) == (until, 5, until)
    error = json.loads(done.stderr.splitlines()[-1])
    assert error["error"].startswith("/dev/full: no more records are written (No space left on device)")
    done = command(*train(server, text, until + 1, "--metrics", text.parent / "none" / "metrics.jsonl"))
    assert (done.returncode, step(server)) == (2, until), (
        "a path that does not exist is refused before any step"
    )


def test_a_run_is_logged_where_the_command_says(server: ServerProcess, text: Path, tmp_path: Path) -> None:
    until = step(server) + 2
    logs = ["--log", f"csv:{tmp_path / 'm.csv'}", "--log", f"jsonl:{tmp_path / 'm.jsonl'}"]
    done = command(*train(server, text, until, *logs))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = [row["step"] for row in csv.DictReader(file)]
    lines = [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows[-2:] == [str(number) for number in lines[-2:]] == [f"{until - 1}", f"{until}"]
    for wrong, words in (
        ("tensorbord:runs", "a log must be KIND:PLACE, where KIND is one of jsonl, csv"),
        ("csv:", "got 'csv:'"),
        ("csv:/nowhere/m.csv", "No such file or directory"),
    ):
        done = command(*train(server, text, until + 1, "--log", wrong))
        assert (done.returncode, step(server)) == (2, until), "before any step"
        assert words in done.stderr.decode()
        assert b"Errno" not in done.stderr
        assert b"training is not affected" not in done.stderr
    done = command(*train(server, text, until + 2, "--log", "csv:/dev/full", "--json"))
    assert (done.returncode, step(server)) == (7, until + 2)


class Answering:
    """The part of a Trainer that `fit` needs; steps are answered at once."""

    def __init__(self) -> None:
        self.step, self.lineage, self.run_id, self.digest = 0, 1, "run", b"d" * 32
        self.evaluated = (0, 0)
        self.seconds_waited = 0.0

    def settle(self) -> None: ...

    def _check_process(self) -> None: ...

    def submit(self, rows: Any, *, step: int, **options: Any) -> Any:
        from concurrent.futures import Future

        from maskwire.results import Losses, Outcome, StepMetrics, StepResult

        self.step, future = step, Future()  # type: ignore[var-annotated]
        metrics = StepMetrics(0.5, 0.1, 3, 4, 0.0, 0.01, 0.0)
        future.set_result(
            StepResult(step, Losses(1.0, 1.0, None), Outcome.APPLIED, False, self.digest, metrics)
        )
        return future


class Rows:
    files: list[Path]

    def batch(self, step: int) -> Any:
        return [[1, 2]]


class Failing(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class Narrow(io.TextIOWrapper):
    """A stream that accepts only ASCII."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")


def test_fit_trains_without_stderr_and_with_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, Failing(), Narrow()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert fit(Answering(), Rows(), until_step=3).step == 3
            tell(DISPLAY)
    assert stream.buffer.getvalue().endswith(b"?" * len(DISPLAY) + b"\n")


def test_a_metrics_file_among_the_data_is_refused(text: Path) -> None:
    before, data = text.read_bytes(), Rows()
    data.files = [text]
    with pytest.raises(ValueError, match=r"a\.txt is a file of the data; choose another file"):
        fit(Answering(), data, until_step=1, progress=False, metrics=text.parent / ".." / "texts" / "a.txt")
    assert text.read_bytes() == before


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyError("bad"), OSError("bad"), TypeError("bad")], ids=repr
)
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "words"])
def test_an_error_while_showing_a_result_prints_it_in_plain_form(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, error: Exception, as_json: bool
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(maskwire.cli.display, "to_json" if as_json else "_text", fail)
    done = CliRunner().invoke(
        app, ["checkpoint", "list", "-t", server.address, *(["--json"] if as_json else [])]
    )
    assert done.exit_code == 7, done.output
    assert "step-000000000" in done.stdout, "the result is printed in plain form"
    assert "is printed in plain form, because formatting it failed" in done.stderr


def test_sigterm_during_startup_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 130)):
        monkeypatch.setattr(exit_codes, "_signal", number)
        assert exit_codes.correct_exit_code(130) == code
        assert exit_codes.correct_exit_code(3) == 3


def test_server_commands_survive_closed_and_full_output(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / f"é {DISPLAY}", COUNTING, model__num_tokens="257", model__mask_id="256")
    server.start()
    assert server.stop() == 0
    run = server.folder / "run"
    reading, writing = os.pipe()
    os.close(reading)
    config = tmp_path / "maskwire.toml"
    verify = ["maskwire-server", "verify", "--run-dir", run]
    try:
        done = command(*verify, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert (done.returncode, b"nothing is damaged" in done.stdout) == (0, True)
        assert command(*verify, stdout=writing, stderr=writing).returncode == 0
        assert command("maskwire-server", "init", config, closed=(0, 1, 2)).returncode == 0
        with Path("/dev/full").open("w") as full:
            done = command(*verify, "--json", stdout=full)
        assert done.returncode == 7
        assert b"No space left on device" in done.stderr
    finally:
        os.close(writing)
    assert "\n" in config.read_text(encoding="utf-8")


def test_a_server_keeps_serving_after_its_output_is_closed(tmp_path: Path, text: Path) -> None:
    """A closed stderr and an unread ready line do not end the server, and its files stay intact."""
    flags = ["--set", "model.dim=32", "--set", "model.depth=1", "--set", "model.heads=1", "--set",
             "model.dim_head=32", "--set", "model.max_seq_len=16", "--set", "model.num_tokens=257",
             "--set", "model.mask_id=256", "--set", "serve.threads=1"]  # fmt: skip
    socket = tmp_path / "socket"
    arguments = ["serve", "--run-dir", tmp_path / "run", "--address", f"unix:{socket}", *flags]
    words = [str(BIN / "maskwire-server"), *map(str, arguments)]
    process = subprocess.Popen(closing((2,), words), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert b"listening on" in process.stdout.readline()
        process.stdout.close()
        done = command("maskwire", "train", text, "--until-step", 3, "-t", f"unix:{socket}", "--length", 16)
        assert done.returncode == 0, done.stderr
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert command("maskwire-server", "verify", "--run-dir", tmp_path / "run").returncode == 0


def test_both_packages_have_the_same_streams_module() -> None:
    client = ROOT / "client" / "maskwire" / "standard_streams.py"
    assert client.read_text() == (ROOT / "server" / "maskwire_server" / "cli" / "streams.py").read_text()
