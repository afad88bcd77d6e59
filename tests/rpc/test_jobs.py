"""`maskwire` as a scheduler runs it: stopped at any step, started again, and the same run comes out."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from certificates import TOKENS, Authority, token_files
from serving import ServerProcess

from maskwire.data.prepare import prepare

Serve = Callable[..., ServerProcess]
MASKWIRE = str(Path(sys.executable).with_name("maskwire"))
TINY = {"model__num_tokens": "257", "model__mask_id": "256"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "one.txt"
    path.parent.mkdir()
    path.write_bytes(np.random.default_rng(5).integers(10, 256, 3000, dtype=np.uint8))
    return path


def train(server: ServerProcess, *arguments: object, until: int = 12) -> list[str]:
    options = {
        "--target": server.address,
        "--until-step": until,
        "--length": 32,
        "--batch-size": 4,
        "--seed": 9,
    }
    flags = [str(part) for pair in options.items() for part in pair]
    return [MASKWIRE, "train", *flags, "--json", *map(str, arguments)]


def done(command: list[str], **options: Any) -> dict[str, Any]:
    found = fork_server.run(command, text=True, **options)
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def test_the_same_bytes_give_the_same_digest_in_every_form(serve: Serve, text: Path, tmp_path: Path) -> None:
    ids = np.fromfile(text, dtype=np.uint8)
    np.save(tmp_path / "ids.npy", ids)
    ids.astype("<u2").tofile(tmp_path / "ids.u16")
    ids.astype("<i4").tofile(tmp_path / "ids.i32")
    prepare(text, tmp_path / "prepared")
    forms: dict[str, tuple[object, ...]] = {
        "file": (text,),
        "folder": (text.parent,),
        "npy": (tmp_path / "ids.npy",),
        "uint16": (tmp_path / "ids.u16", "--dtype", "uint16"),
        "int32": (tmp_path / "ids.i32", "--dtype", "int32"),
        "prepared": (tmp_path / "prepared",),
    }
    digests = {
        name: done(train(serve(name, seconds=0), *arguments))["digest"] for name, arguments in forms.items()
    }
    assert len(set(digests.values())) == 1, digests
    other = done(train(serve("other", seconds=0), text, "--batch-size", 5))["digest"]
    assert other not in digests.values(), "the digest covers the batches"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_stopped_anywhere_and_started_again_the_digest_is_the_same(
    serve: Serve, text: Path, tmp_path: Path, how: Any
) -> None:
    calm = done(train(serve("calm", seconds=0), text, until=60))
    rough = serve("rough", seconds=0.02)
    metrics = tmp_path / "metrics.jsonl"
    command = [*train(rough, text, until=60), "--metrics", str(metrics)]
    draw = random.Random(how)
    codes = []

    def trained() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    for _ in range(3):
        job = fork_server.Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        enough = trained() + draw.randrange(1, 10)
        while job.poll() is None and trained() < enough:
            time.sleep(0.005)
        job.send_signal(how)
        out, err = job.communicate(timeout=60)
        codes.append(job.returncode)
        assert "Traceback" not in err, err
        if job.returncode in (130, 143):
            assert json.loads(out)["interrupted"]
    assert codes == [{signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how]] * 3
    finished = done(command)
    assert (finished["step"], finished["digest"]) == (60, calm["digest"])
    again = done(command)
    assert (again["steps"], again["digest"]) == (0, calm["digest"]), "the same command finds nothing to do"


def test_a_signal_ends_a_job_whose_server_is_gone(serve: Serve, text: Path) -> None:
    server = serve(seconds=0.05)
    job = fork_server.Process(
        train(server, text, until=1000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    server.wait_for_step(3)
    server.kill()
    said_waiting(job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=100)  # of the 300 s that it would wait for the server
    assert job.returncode == 143, err
    assert json.loads(out)["interrupted"]
    waiting = fork_server.Process(
        train(server, text), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said_waiting(waiting)
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=100)
    assert waiting.returncode == 143, "also while it waits to connect"


def said_waiting(job: subprocess.Popen[str]) -> None:
    """Read what a job says until it waits for its server."""
    assert job.stderr is not None
    for line in job.stderr:
        if "waiting" in line:
            return
    pytest.fail("it never waited for its server")


def test_a_second_signal_ends_a_job_at_once(serve: Serve, text: Path) -> None:
    server = serve(seconds=0.05)
    job = fork_server.Process(
        train(server, text, until=1000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    server.wait_for_step(3)
    server.kill()
    said_waiting(job)
    for _ in range(2):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    job.communicate(timeout=30)
    assert job.returncode == 143


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return fork_server.run([MASKWIRE, *map(str, arguments)], text=True)


def test_every_failure_has_its_exit_code_and_json(serve: Serve, text: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.issue("server", "127.0.0.1")
    server = serve(
        seconds=0,
        serve__tls_certificate=pair.cert,
        serve__tls_key=pair.key,
        **token_files(tmp_path / "tokens"),
    )
    token = ["--token-file", tmp_path / "tokens" / "train"]
    access = ["--target", server.address, "--ca", authority.ca, *token, "--json"]
    cases: list[tuple[list[object], int, str]] = [
        (["status", "--target", server.address, "--ca", authority.ca], 6, "UNAUTHENTICATED"),
        (["checkpoint", "restore", "a", *access], 6, "PERMISSION_DENIED"),
        (["health", "--target", server.address, "--ca", Authority(tmp_path / "b").ca], 6, "TLS"),
        (["checkpoint", "save", "Not-A-Name", *access], 1, "INVALID_FIELD"),
        (["train", text, "--until-step", -1, *access], 2, ""),
        (["train", text, "--until-step", 1, "--eval-every", 0, *access], 2, ""),
        (["train", text, "--until-step", 1, "--dtype", "int7", *access], 2, ""),
        (["eval", text, "--rows", 0, *access], 2, ""),
        (["status", "--target", "127.0.0.1:1", "--retry-for", 0.1], 3, "UNAVAILABLE"),
        (["status", *access[:-1], "--cert", pair.cert], 2, ""),
        (["status", "--target", "192.0.2.1:1", *token], 2, ""),
        (["data", "prepare", tmp_path / "none", "--out", tmp_path / "out"], 2, ""),
    ]
    for arguments, code, reason in cases:
        found = run(*arguments, *(() if "--json" in arguments else ("--json",)))
        assert found.returncode == code, (arguments, found.stderr)
        error = json.loads(found.stderr.splitlines()[-1])
        assert (error["exit_code"], error["reason"]) == (code, reason), arguments
        assert error["retryable"] is (code == 3), arguments
        assert found.stdout == ""
        assert "Traceback" not in found.stderr
        assert not any(secret in found.stderr for secret in TOKENS.values())
    assert run("train", text, "--until-step", 3, "--length", 16, *access).returncode == 0
    words = run("status", *access[:-1])
    assert words.returncode == 0
    assert "bytes" in words.stdout, "the run's tokenizer"
    assert "in plaintext" in run("status", "--target", "192.0.2.1:1", *token).stderr


def test_the_tokenizer_stays_with_the_run(serve: Serve, text: Path, tmp_path: Path) -> None:
    server = serve(seconds=0)
    assert run("train", text, "--until-step", 2, "--length", 16, "--target", server.address).returncode == 0
    other = tmp_path / "other"
    prepare(text, other)
    meta = json.loads((other / "maskwire-data.json").read_text())
    (other / "maskwire-data.json").write_text(json.dumps({**meta, "tokenizer": f"sha256:{'0' * 64}"}))
    for _ in range(2):
        for command in (["train", other, "--until-step", 4], ["eval", other]):
            found = run(*command, "--length", 16, "--target", server.address)
            assert found.returncode == 1, found.stderr
            assert "the run uses tokenizer bytes, but this" in found.stderr
        server.kill()
        server.start()
    assert run("train", text, "--until-step", 4, "--length", 16, "--target", server.address).returncode == 0
    np.save(tmp_path / "ids.npy", np.fromfile(text, dtype=np.uint8))
    unsaid = run("train", tmp_path / "ids.npy", "--until-step", 5, "--length", 16, "--target", server.address)
    assert unsaid.returncode == 0, "an array does not say what its ids stand for"


def test_data_and_weights_by_command(serve: Serve, text: Path, tmp_path: Path) -> None:
    found = run("data", "prepare", text.parent, "--out", tmp_path / "packed")
    assert found.returncode == 0
    assert "num_tokens = 257\nmask_id = 256" in found.stdout
    assert run("data", "prepare", text.parent, "--out", tmp_path / "packed").returncode == 2
    server = serve(**TINY)
    target = ["--target", server.address]
    trained = run("train", tmp_path / "packed", "--until-step", 3, "--eval-every", 2, "--eval-data",
                  text, "--length", 16, *target)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "held out" in trained.stderr
    evaluated = json.loads(
        run("eval", tmp_path / "packed", "--length", 16, "--rows", 4, *target, "--json").stdout
    )
    assert evaluated["bits_per_byte"] == pytest.approx(evaluated["bits_per_token"])
    assert run("checkpoint", "save", "mine", *target).returncode == 0
    got = run("checkpoint", "download", "mine", "--weights", "--out", tmp_path / "got", *target, "--json")
    assert json.loads(got.stdout)["files"] == ["manifest.json", "model.safetensors"]
    words = run("checkpoint", "download", "--out", tmp_path / "newest", *target)
    assert words.returncode == 0
    assert "optimizer.safetensors" in words.stdout
    missing = run("checkpoint", "download", "mine", "--ema", "--out", tmp_path / "ema", *target)
    assert (missing.returncode, "no moving average" in missing.stderr) == (1, True)


def test_the_learning_rate_and_the_total_may_change_also_behind_a_kill(serve: Serve, text: Path) -> None:
    def schedule(rate: str, total: int) -> list[str]:
        return [
            f"--set=optimizer.learning_rate={rate}", "--set=optimizer.schedule=cosine",
            f"--set=optimizer.total_steps={total}", "--set=optimizer.warmup_steps=2",
            "--set=optimizer.ema_decay=0.9", f"--set=optimizer.weight_decay={rate}",
        ]  # fmt: skip

    calm = serve("calm", **TINY)
    rough = serve("rough", **TINY)
    for server in (calm, rough):
        server.stop()
        server._command += schedule("0.01", 40)
        server.folder.joinpath("run").rename(server.folder / "old")  # a new run with a moving average
        server.start()
        done(train(server, text, until=10))
        if server is calm:
            assert server.stop() == 0  # saved at step 10: nothing is computed again
        else:
            server.kill()  # ten steps are, under the settings that they were trained with
        server._command += schedule("0.002", 60)
        server.start()
        done(train(server, text, until=20))
    assert "replayed 10 steps" in rough.log.read_text()
    states = [
        json.loads(run("eval", text, "--length", 32, "--rows", 4, "--target", s.address, "--json").stdout)
        for s in (calm, rough)
    ]
    assert states[0]["nats_per_token"] == states[1]["nats_per_token"]
    rough.kill()
    rough._command.append("--set=optimizer.ema_decay=0")
    refused = fork_server.run(rough._command, text=True)
    assert refused.returncode == 3
    assert "optimizer.ema_decay was 0.9 and is now 0.0" in refused.stderr


def test_a_refused_batch_stops_a_job_in_its_place_whatever_the_window(serve: Serve, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(10, 200, (400, 16), dtype=np.int32)
    ids[123, 4] = 300
    np.save(tmp_path / "some-bad.npy", ids)
    ends = set()
    for window in (1, 4, 8):
        server = serve(f"window-{window}", seconds=0)
        command = [*train(server, tmp_path / "some-bad.npy", until=300), "--window", str(window)]
        for _ in range(2):
            found = fork_server.run(command, text=True)
            assert found.returncode == 1
            assert "is 300" in found.stderr
            status = json.loads(run("status", "--target", server.address, "--json").stdout)
            ends.add((status["step"], status["digest"]))
    assert len(ends) == 1, "at the same step, once more too, and with every window"
    assert next(iter(ends))[0] > 0
