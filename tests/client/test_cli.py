"""The command's exit codes and output, against a real server process."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rpc"))

from serving import ServerProcess

import maskwire
from maskwire.cli import app, exit_codes
from maskwire.cli.train import check_tokenizer
from maskwire.client import Client
from maskwire.errors import HaltedError
from maskwire.process_identity import default_name

NO_INTERVAL = "needs --eval-every, the number of steps between evaluations"
COUNTING = [sys.executable, str(Path(__file__).resolve().parents[1] / "rpc" / "counting_server.py"), "0"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = ServerProcess(
        tmp_path_factory.mktemp("cli"), COUNTING, model__num_tokens="257", model__mask_id="256"
    ).start()
    yield made
    assert made.stop() == 0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(bytes(range(10, 90)) * 9 + bytes([number]))
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_until_step_is_absolute_and_training_resumes(server: ServerProcess, texts: Path) -> None:
    metrics = texts.parent / "metrics.jsonl"
    common = ["train", texts, "--target", server.address, "--length", 64, "--batch-size", 4, "--json"]
    code, out, err = run(*common, "--until-step", 5, "--metrics", metrics)
    assert code == 0, err
    first = json.loads(out)
    assert (first["step"], first["steps"], first["interrupted"]) == (5, 5, False)
    assert first["name"] == default_name()
    code, _, err = run(*common[:-1], "--until-step", 6, "--name", "mine")
    assert code == 0
    assert err.startswith("training from step 5 to 6: 4 rows of 64 tokens per step, as 'mine'\n")
    held_out = [*common, "--until-step", 9, "--eval-every", 4, "--held-out", 0.3, "--checkpoint-every", 4]
    code, out, err = run(*held_out)
    refused = json.loads(err.splitlines()[-1])
    assert (code, refused["reason"]) == (1, "DATA_CHANGED")
    assert refused["error"].startswith(
        "held_out was not set and is 0.3: leave out --eval-every, or give --eval-data too. The data differs "
    )
    assert refused["error"].count("allow") == 1
    assert "or continue with the changed data (--allow-changed-data)" in refused["error"]
    code, _, err = run(*(word for word in held_out if word != "--json"))
    assert (code, "training from" in err) == (1, False), "nothing is announced that does not begin"
    code, out, _ = run(*held_out, "--allow-changed-data")
    assert code == 0
    assert json.loads(out)["steps"] == 3
    code, _, err = run(*common, "--until-step", 10)
    undone = "held_out was 0.3 and is not set: repeat --eval-every and --held-out 0.3. The data differs "
    assert (code, json.loads(err)["error"].startswith(undone)) == (1, True)
    code, out, _ = run(*common, "--until-step", 9)
    assert (code, json.loads(out)["steps"]) == (0, 0), "nothing left to do"
    for until in (9, 3):
        code, out, _ = run(*common[:-1], "--until-step", until)
        assert (code, out) == (
            0,
            f"nothing to train: the run is at step 9 already, and --until-step {until} is an absolute "
            "number; give a larger one to train further\n",
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["tokens"] == 256 and len(line["digest"]) == 64 for line in lines)


def test_status_health_and_eval_print_text_and_json(server: ServerProcess, texts: Path) -> None:
    code, out, _ = run("status", "--target", server.address, "--json")
    assert (code, json.loads(out)["state"]) == (0, "SERVING")
    code, out, _ = run("status", "--target", server.address)
    assert code == 0
    assert "SERVING" in out
    assert "speed (last minute)" in out
    assert re.search(r"none \(\d+ sessions? so far\)", out)
    code, out, _ = run("status", "--target", server.address, "--until-step", 10**6)
    assert "time to step 1000000" in out
    code, out, _ = run("status", "--target", server.address, "--until-step", 0, "--json")
    assert json.loads(out)["seconds_left"] == 0
    assert run("health", "--target", server.address)[:2] == (0, "serving\n")
    assert run("health", "--target", server.address, "--service", "liveness")[0] == 0
    code, out, _ = run("eval", texts, "--target", server.address, "--length", 32, "--rows", 6, "--json")
    assert code == 0
    assert json.loads(out)["draws"] == 16
    code, out, _ = run("eval", texts, "--target", server.address, "--length", 32, "--rows", 6)
    assert "bits per token" in out


def test_eval_without_a_terminal_reports_the_rows_and_its_progress(
    server: ServerProcess, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskwire.progress_bar.PLAIN_EVERY_SECONDS", 0)
    common = ["eval", texts, "--target", server.address, "--length", 400, "--batch-size", 40]
    code, _, err = run(*common)
    assert code == 0
    first, *lines = err.splitlines()
    assert first == "evaluating 80 rows, all of the data; limit it with --rows"
    assert [line.partition("rows")[0] for line in lines] == ["evaluating: 40 of 80 ", "evaluating: 80 of 80 "]
    monkeypatch.setattr("maskwire.progress_bar.PLAIN_EVERY_SECONDS", 1e9)
    assert run(*common, "--rows", 3)[2] == "evaluating 3 rows\n", "a line at most every so many seconds"
    assert run(*common, "--rows", 3, "--json")[2] == ""


def test_ctrl_c_during_eval_reports_the_rows_done(
    server: ServerProcess, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(client: Client, data: object, on_progress: Callable[..., None], **_: object) -> None:
        on_progress(40, 80, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "evaluate", evaluate)
    code, out, err = run("eval", texts, "--target", server.address, "--length", 400)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted after 40 of 80 rows; the run was not changed"


def test_generate_samples_rows_and_fills_gaps(server: ServerProcess) -> None:
    target = ["--target", server.address]
    code, out, err = run("generate", *target, "--count", 2, "--length", 3, "--seed", 97)
    assert (code, out) == (0, "abc\nbcd\n"), err
    assert "3 passes" in err
    filled = ["--prompt", "a~c~", "--prompt-ids", "65, ~", "--row-seed", 65, "--row-seed", 97, "--json"]
    code, out, _ = run("generate", *target, *filled)
    found = json.loads(out)
    assert (code, found["text"], found["done"]) == (0, ["aBcD", "Ab"], True)
    assert found["tokens"] == [[97, 66, 99, 68], [65, 98]]
    longer = ["--prompt", "a*", "--gap", "*", "--length", 4, "--count", 2, "--seed", 64, "--json"]
    assert json.loads(run("generate", *target, *longer)[1])["text"] == ["aABC", "aBCD"]
    for arguments, code, words in (
        (["--order", "critic"], 1, "needs a critic"),
        (["--order", "sideways"], 2, "must be one of random"),
        (["--count", 0], 2, "--count must be at least 1"),
        (["--prompt", ""], 2, "must not be empty"),
        (["--prompt-ids", "1,x"], 2, "comma-separated ids and gaps"),
        (["--prompt", "a~", "--gap", ""], 2, "--gap must not be empty"),
        (["--prompt", "a~", "--gap", "xy"], 2, "--gap must be one character, got 'xy'"),
        (["--prompt", "abc", "--length", 3], 1, "at least one position to sample"),
        (["--row-seed", 1, "--row-seed", 2], 1, "one seed per row"),
    ):
        found_code, _, err = run("generate", *target, *arguments)
        assert found_code == code, (arguments, err)
        assert words in err


def test_checkpoints_are_saved_listed_and_restored(server: ServerProcess) -> None:
    target = ["--target", server.address]
    code, out, _ = run("checkpoint", "save", "by-hand", *target, "--label", "why=test", "--json")
    assert code == 0
    assert json.loads(out)["labels"] == {"why": "test"}
    code, _, err = run("checkpoint", "save", "by-hand", *target)
    assert code == 1
    assert "taken" in err
    code, _, err = run("checkpoint", "save", "Best", *target)
    assert code == 1
    assert err == (
        "maskwire: name must have 1 to 64 lower-case letters, digits, - and _, and start with a letter or a "
        "digit, got 'Best'\n"
    )
    code, out, _ = run("checkpoint", "list", *target, "--json")
    assert "by-hand" in [info["name"] for info in json.loads(out)]
    assert "by-hand" in run("checkpoint", "list", *target)[1]
    code, out, _ = run("checkpoint", "restore", "by-hand", *target, "--json")
    assert (code, json.loads(out)["lineage"]) == (0, 2)
    assert run("checkpoint", "restore", "nothing", *target)[0] == 1


def test_each_mistake_has_its_exit_code_and_no_traceback(server: ServerProcess, texts: Path) -> None:
    nowhere = ["--target", "127.0.0.1:1", "--retry-for", "0.1"]
    refused = "127.0.0.1:1 did not answer (connection refused); check that the server is"
    for arguments, code, words in (
        (["status", *nowhere], 3, "is the server running"),
        (["train", texts, "--until-step", 1, *nowhere], 3, "is the server running"),
        (["health", "--target", "127.0.0.1:1", "--retry-for", "0.2"], 3, refused),
        (["train", texts / "none", "--until-step", 99, "--target", server.address], 2, "no such file"),
        (
            [
                "train",
                texts,
                "--until-step",
                99,
                "--length",
                9999,
                "--allow-changed-data",
                "--target",
                server.address,
            ],
            2,
            "--length must be 1 to 512, the longest row of the model, got 9999",
        ),
        (["train", texts, "--target", server.address], 2, "--until-step"),
        (["train", texts, "--until-step", 99, "--save-best", "--target", server.address], 2, NO_INTERVAL),
        (["train", texts, "--until-step", 99, "--held-out", 0.05], 2, f"--held-out {NO_INTERVAL}"),
        (["train", texts, "--until-step", 99, "--eval-rows", 8], 2, f"--eval-rows {NO_INTERVAL}"),
        (["train", texts / "0.txt", "--until-step", 99, "--eval-every", 9], 2, "or give --eval-data"),
        (
            ["train", texts, "--until-step", 99, "--eval-every", 9, "--held-out", 0.1, "--eval-data", texts],
            2,
            "and --held-out 0.1 exclude each other",
        ),
        (
            ["train", texts, "--until-step", 99, "--eval-every", 9, "--held-out", 0.001],
            2,
            "--held-out 0.001 selected none of the 40 documents (each is selected by a hash of its content). "
            "Set --held-out 0.0",
        ),
        (
            ["eval", texts, "--rows", 4, "--length", 9999, "--target", server.address],
            2,
            "--length must be 1 to 512, the longest row of the model, got 9999",
        ),
        (
            ["checkpoint", "save", "--label", "foo", "--target", server.address],
            2,
            "--label must have the form KEY=VALUE, got foo\n",
        ),
        (
            ["health", "--service", "unknown", "--target", server.address],
            2,
            "--service must be empty or 'liveness', got 'unknown'",
        ),
    ):
        found, _, err = run(*arguments)
        assert found == code, (arguments, err)
        assert words in err
        assert "Traceback" not in err


def test_errors_name_command_line_options_as_the_remedy(server: ServerProcess, texts: Path) -> None:
    with maskwire.connect(server.address, name="another"):
        code, _, err = run("train", texts, "--until-step", 99, "--target", server.address)
    assert code == 4
    assert err.rstrip().endswith("wait until that session is closed or idle, or take over (--takeover)")
    assert "`maskwire status" not in run("status", "--target", "127.0.0.1:1", "--retry-for", "0.1")[2]


def test_a_data_file_that_changes_during_a_command_names_the_option_to_continue(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = maskwire.open_data(texts, length=8, batch_size=2)
    for file in texts.iterdir():
        file.write_bytes(b"shorter")
    with pytest.raises(typer.Exit) as end, exit_codes.errors(as_json=False):
        data.batch(1)
    assert end.value.exit_code == 2
    words = "or run the command again; `maskwire train` then needs --allow-changed-data\n"
    assert capsys.readouterr().err.endswith(words)


def test_a_halted_run_names_the_option_that_resumes_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = "three steps in a row were not finite; look at the data, then open a session with takeover"
    with pytest.raises(typer.Exit), exit_codes.errors(as_json=False):
        raise HaltedError(words, reason="HALTED")
    assert capsys.readouterr().err.endswith("look at the data, then run the command again with --takeover\n")


def test_raw_text_for_a_run_of_a_tokenizer_names_the_commands_that_prepare_it(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    made = ServerProcess(folder, COUNTING, model__num_tokens="257", model__mask_id="256").start()
    (tmp_path / "a.txt").write_text("raw text " * 9)
    other = f"sha256:{'0' * 64}"
    data = maskwire.TokenData([[1, 2, 3]], length=3, batch_size=2, tokenizer=other)
    with maskwire.connect(made.address) as trainer:
        trainer.fit(data, until_step=1, progress=False)
    for arguments in (["train", tmp_path / "a.txt", "--until-step", 2], ["eval", tmp_path / "a.txt"]):
        code, _, err = run(*arguments, "--target", made.address)
        assert code == 1
        assert f"the run uses tokenizer {other}, but this " in err
        assert (
            "uses bytes: download the run's tokenizer (maskwire data tokenizer --out TOKENIZER) and " in err
        )
        assert "(maskwire data prepare PATH --tokenizer TOKENIZER --out FOLDER)" in err
    made.stop()


def test_evaluation_data_of_another_tokenizer_names_the_command_that_prepares_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), exit_codes.errors(as_json=False):
        check_tokenizer("sha256:1", "bytes", "the training data")
    words = "(maskwire data prepare PATH --tokenizer TRAINING/tokenizer.json --out FOLDER)"
    assert words in capsys.readouterr().err
