"""Who takes whose session over, and who is told: with processes that live, end, and are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
from maskwire.errors import FencedError, HaltedError, WriterPresentError

Serve = Callable[..., ServerProcess]
MASKWIRE = str(Path(sys.executable).with_name("maskwire"))
BATCH = np.full((1, 4), 20)
SCRIPTS = {
    "blocking": "import maskwire, numpy, sys; trainer = maskwire.connect(sys.argv[1]); "
    "print(trainer.train_step(numpy.full((1, 4), 20)).step, flush=True)",
    "asyncio": """
import asyncio, maskwire.aio, numpy, sys
async def main():
    trainer = await maskwire.aio.connect(sys.argv[1])
    print((await trainer.train_step(numpy.full((1, 4), 20))).step, flush=True)
    if len(sys.argv) > 2: sys.stdin.read()
asyncio.run(main())
""",
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes apart")


def start(*command: object) -> subprocess.Popen[str]:
    started: subprocess.Popen[str] = fork_server.Process(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return started


def script(server: ServerProcess, kind: str, *, waiting: bool = False) -> subprocess.Popen[str]:
    code = SCRIPTS[kind] + ("; sys.stdin.read()" if waiting and kind == "blocking" else "")
    return start(sys.executable, "-c", code, server.address, *(["wait"] if waiting else []))


def killed(job: subprocess.Popen[str]) -> int:
    """Kill a script once its step is done; its process id."""
    assert job.stdout is not None
    assert job.stdout.readline()
    job.kill()
    job.communicate()
    return job.pid


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "one.txt"
    path.parent.mkdir()
    path.write_bytes(b"some text, and more of it. " * 100)
    return path


def train(server: ServerProcess, text: Path, *arguments: object) -> subprocess.Popen[str]:
    return start(
        MASKWIRE, "train", text, "--until-step", 100000, "--length", 16, "--batch-size", 2,
        "--target", server.address, *arguments,
    )  # fmt: skip


def until_step(server: ServerProcess, step: int) -> Any:
    """The run's status once it is at a step."""
    deadline = time.monotonic() + 60
    with maskwire.attach(server.address) as client:
        while (status := client.status()).step < step:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return status


def test_two_jobs_without_a_name_do_not_take_each_other_over(serve: Serve, text: Path) -> None:
    server = serve(seconds=0.005)
    first = train(server, text)
    try:
        writer = until_step(server, 3).writer
        second = train(server, text, "--json")
        _, err = second.communicate(timeout=60)
        assert second.returncode == 4, err
        error = json.loads(err.splitlines()[-1])
        assert error["reason"] == "WRITER_PRESENT"
        assert writer in error["error"]
        assert f"process {first.pid})" in error["error"]
        status = until_step(server, until_step(server, 0).step + 3)
        assert (status.writer, first.poll()) == (writer, None), "the first goes on"
    finally:
        first.kill()
        first.communicate()


def test_a_job_of_the_same_name_takes_over_and_both_are_told(serve: Serve, text: Path) -> None:
    server = serve(seconds=0.005)
    first = train(server, text, "--name", "nightly")
    until_step(server, 3)
    second = train(server, text, "--name", "nightly")
    try:
        _, err = first.communicate(timeout=60)
        assert first.returncode == 4
        host = os.uname().nodename
        assert f"'nightly' (host {host}, process {second.pid}) took over" in err.replace("\n", " ")
    finally:
        second.terminate()
        _, told = second.communicate(timeout=60)
    assert f"took over the session of 'nightly' (host {host}, process {first.pid})" in told
    assert "gone" not in told


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_that_was_killed_runs_again_at_once(serve: Serve, kind: str) -> None:
    server = serve(seconds=0)
    first = script(server, kind, waiting=True)
    pid = killed(first)
    again = script(server, kind)
    out, err = again.communicate(timeout=60)
    assert (out.strip(), again.returncode) == ("2", 0), err
    assert f"process {pid}), a process that is gone" in err


def test_the_process_is_remembered_across_a_crash_of_the_server(serve: Serve) -> None:
    server = serve(seconds=0)
    pid = killed(script(server, "blocking", waiting=True))
    server.kill()
    server.start()
    told: list[str] = []
    with maskwire.connect(server.address, on_takeover=told.append) as trainer:
        assert trainer.train_step(BATCH).step == 2
    assert len(told) == 1
    assert f"process {pid}), a process that is gone" in told[0]


def test_a_script_that_lives_keeps_its_session(serve: Serve) -> None:
    server = serve(seconds=0)
    alive = script(server, "blocking", waiting=True)
    try:
        assert alive.stdout is not None
        assert alive.stdout.readline()
        with pytest.raises(WriterPresentError, match=f"process {alive.pid}"):
            maskwire.connect(server.address)
        told: list[str] = []
        with maskwire.connect(server.address, takeover=True, on_takeover=told.append):
            assert told == [told[0]]
            assert f"process {alive.pid})" in told[0]
            assert "gone" not in told[0]
        told.clear()
        with maskwire.connect(server.address, on_takeover=told.append):
            assert told == [], "the session before was closed"
    finally:
        alive.kill()
        alive.communicate()


def test_a_connection_of_the_same_process_is_told_who_took_over(serve: Serve) -> None:
    server = serve(seconds=0)
    first = maskwire.connect(server.address)
    first.train_step(BATCH)
    with maskwire.connect(server.address, name="other", takeover=True) as second:
        second.train_step(BATCH)
    with pytest.raises(FencedError, match=rf"'other' \(host .*, process {os.getpid()}\) took over") as raised:
        first.train_step(BATCH)
    assert raised.value.metadata["writer"] == "other", "although it has closed its session since"
    first.close()


def test_taking_over_from_a_process_that_is_gone_does_not_end_a_halt(serve: Serve) -> None:
    server = serve(seconds=0)
    killed(script(server, "blocking", waiting=True))
    with maskwire.connect(server.address) as trainer:
        for _ in range(3):
            trainer.train_step(np.full((1, 4), 7))
    killed_again = script(server, "blocking", waiting=True)
    out, err = killed_again.communicate(timeout=60)
    assert killed_again.returncode != 0
    assert (out, HaltedError.__name__ in err) == ("", True)
    with maskwire.connect(server.address) as trainer, pytest.raises(HaltedError):
        trainer.train_step(BATCH)
