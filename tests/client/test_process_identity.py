"""Whether a process has surely ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from maskwire import process_identity
from maskwire.v1 import training_service_pb2 as pb

DESCRIBE = (
    "import sys; from maskwire.process_identity import this_process, default_name; "
    "sys.stdout.write(this_process().SerializeToString().hex() + ' ' + default_name() + '\\n'); "
    "sys.stdout.flush(); sys.stdin.read()"
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes apart")


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], pb.ClientProcess, str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", DESCRIBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    described, name = started.stdout.readline().split()
    yield started, pb.ClientProcess.FromString(bytes.fromhex(described)), name
    started.kill()
    started.communicate()


def changed(holder: pb.ClientProcess, **fields: object) -> pb.ClientProcess:
    other = pb.ClientProcess()
    other.CopyFrom(holder)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def test_a_process_is_gone_once_it_has_ended_reaped_or_not(
    child: tuple[subprocess.Popen[str], pb.ClientProcess, str],
) -> None:
    started, holder, _ = child
    assert holder.process_id == started.pid
    assert not process_identity.is_gone(holder)
    assert not process_identity.is_gone(process_identity.this_process())
    started.kill()
    deadline = time.monotonic() + 20
    while not process_identity.is_gone(holder):  # a zombie: nobody has waited for it yet
        assert time.monotonic() < deadline
    assert started.wait() == -9
    assert process_identity.is_gone(holder)


def test_another_process_under_the_same_id_is_another_one(
    child: tuple[subprocess.Popen[str], pb.ClientProcess, str],
) -> None:
    _, holder, _ = child
    assert process_identity.is_gone(changed(holder, start_time_ticks=holder.start_time_ticks - 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "elsewhere"},
        {"boot_id": "another"},
        {"boot_id": ""},
        {"pid_namespace": "pid:[1]"},
        {"pid_namespace": ""},
        {"start_time_ticks": 0},
        {"process_id": 0},
        {"process_id": -1},
        {"process_id": 2**40},
    ],
)
def test_what_cannot_be_seen_from_here_is_not_gone(
    child: tuple[subprocess.Popen[str], pb.ClientProcess, str], fields: dict[str, object]
) -> None:
    started, holder, _ = child
    started.kill()
    started.wait()
    assert not process_identity.is_gone(changed(holder, **fields))


def test_a_job_that_its_scheduler_starts_again_finds_its_former_process_gone_on_any_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    first = changed(process_identity.this_process(), host="elsewhere")
    assert first.job == "slurm:4711:0:2:0"
    assert not process_identity.is_gone(first), "another task with the same numbers may live, on another node"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    here = process_identity.this_process()
    assert process_identity.is_gone(first)
    assert not process_identity.is_gone(here), "it lives"
    assert not process_identity.is_gone(changed(here, host="elsewhere"))
    for other in (
        "slurm:4711:0:3:0",
        "slurm:4711:1:2:0",
        "slurm:4712:0:2:0",
        "slurm:4711:0:2:",
        "slurm:4711:0:2",
    ):
        assert not process_identity.is_gone(changed(here, host="elsewhere", job=other)), other
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not process_identity.is_gone(first)
    elsewhere = pb.ClientProcess(host="elsewhere")
    assert not process_identity.is_gone(elsewhere), "two without a job are not of the same"


def test_a_default_name_is_the_process_s_own(
    child: tuple[subprocess.Popen[str], pb.ClientProcess, str],
) -> None:
    _, _, theirs = child
    assert theirs != process_identity.default_name() == process_identity.default_name()
    assert f"-{os.getpid()}-" in process_identity.default_name()


def test_the_process_comes_back_from_an_error_s_metadata() -> None:
    here = process_identity.this_process()
    metadata = {f"writer_{field.name}": str(value) for field, value in here.ListFields()}
    assert process_identity.holder_of(metadata) == here
    assert process_identity.holder_of({"writer": "an older server's"}) == pb.ClientProcess()
    assert not process_identity.is_gone(pb.ClientProcess())
