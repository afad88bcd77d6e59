"""The scripts of the launch files, run with stand-ins for srun, scontrol and the server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main

from maskwire_server.cli import app

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
RUN_SH = DEPLOY / "kubernetes" / "overlays" / "jobset" / "run.sh"
SBATCH = DEPLOY / "slurm" / "maskwire.sbatch"


def serve_options() -> set[str]:
    command: Any = typer.main.get_command(app)
    return {name for option in command.commands["serve"].params for name in option.opts}


STUBS = {
    "srun": 'echo "srun $*" >>"$RECORD"\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": 'case "$1 $2" in\n  "show hostnames") printf "n1\\nn2\\n" ;;\n'
    '  "show job") echo "JobId=7 JobState=$STATE Partition=all" ;;\n'
    '  *) echo "scontrol $*" >>"$RECORD" ;;\nesac',
    "maskwire-server": 'echo "maskwire-server $*" >>"$RECORD"\ncase $CODE in\n  wait)\n'
    '    trap "echo draining >>\\"$RECORD\\"; exit 0" TERM\n    echo ready >>"$RECORD"\n'
    "    while :; do sleep 0.05; done ;;\n"
    "  *) exit $CODE ;;\nesac",
}


class Cluster:
    """A folder with the stubs, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.record, self.leader = folder / "record", folder / "maskwire.toml.leader"
        (folder / "bin").mkdir()
        for name, body in STUBS.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RECORD": str(self.record),
            "RUN_DIR": "/local/run", "CONFIG": str(self.leader.with_suffix("")),
            "CODE": "0", "STATE": "RUNNING", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8", "RENDEZVOUS_HOST": "localhost",
        }  # fmt: skip

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command or ["bash", str(SBATCH)], env={**self.environment, **environment},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, *command: str, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def recorded(self, word: str) -> list[str]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [line for line in lines if line.startswith(word)]

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 60
        while not self.recorded(word):
            assert time.monotonic() < deadline, f"no {word}"
            time.sleep(0.01)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_the_sbatch_script_starts_a_launcher_on_each_node_with_flags_that_exist(cluster: Cluster) -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    code, said = cluster.finish()
    assert (code, said) == (0, "")
    (line,) = cluster.recorded("maskwire-server")
    assert line == (
        f"maskwire-server serve --config {cluster.leader.with_suffix('')} --run-dir /local/run --ranks 8 "
        "--nodes 2 --rendezvous n1:29500"
    )
    assert set(re.findall(r"(?<= )--[a-z-]+", line)) <= serve_options()
    (started,) = cluster.recorded("srun")
    assert started.startswith("srun --ntasks-per-node=1 --kill-on-bad-exit=1 maskwire-server serve")
    assert cluster.leader.read_text() == "n1\n"


def test_the_node_with_the_run_directory_leads_wherever_it_is_in_the_list(cluster: Cluster) -> None:
    cluster.leader.write_text("n2\n")
    assert cluster.finish()[0] == 0
    assert cluster.recorded("maskwire-server")[0].endswith("--rendezvous n2:29500")


@pytest.mark.parametrize("leader", ["n3", "n"])
def test_a_job_without_the_node_of_the_run_directory_starts_nothing(cluster: Cluster, leader: str) -> None:
    cluster.leader.write_text(f"{leader}\n")
    code, said = cluster.finish()
    assert code == 3
    assert said.endswith(f"--nodelist={leader}\n")
    assert not cluster.record.exists()


@pytest.mark.parametrize(
    ("environment", "requeued"),
    [
        ({"CODE": "0"}, True),  # a preemption: Slurm told the server to stop
        ({"CODE": "70"}, True),
        ({"CODE": "3"}, False),
        ({"CODE": "0", "STATE": "CANCELLED"}, False),
        ({"CODE": "70", "SLURM_RESTART_COUNT": "100"}, False),
    ],
)
def test_the_job_is_requeued_unless_a_person_is_needed(
    cluster: Cluster, environment: dict[str, str], requeued: bool
) -> None:
    code, _ = cluster.finish(**environment)
    assert code == int(environment["CODE"])
    assert cluster.recorded("scontrol") == ["scontrol requeue 7"] * requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_before_the_time_limit_the_server_drains_and_the_job_is_requeued(
    cluster: Cluster, number: signal.Signals
) -> None:
    process = cluster.start(CODE="wait")
    cluster.wait_for("ready")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert cluster.recorded("draining")
    assert cluster.recorded("scontrol") == ["scontrol requeue 7"]


def test_a_pod_that_was_told_to_stop_does_not_count_as_finished(cluster: Cluster) -> None:
    process = cluster.start("sh", str(RUN_SH), "serve", "--ranks=8", CODE="wait")
    cluster.wait_for("ready")
    assert cluster.recorded("maskwire-server") == ["maskwire-server serve --ranks=8"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert cluster.recorded("draining")
    assert process.returncode == 143
    assert cluster.finish("sh", str(RUN_SH), CODE="3")[0] == 3


def test_a_pod_waits_for_the_name_of_the_leader_and_can_be_stopped_meanwhile(cluster: Cluster) -> None:
    getent = cluster.record.parent / "bin" / "getent"
    getent.write_text('#!/bin/sh\necho "getent $*" >>"$RECORD"\n[ -e "$RECORD.known" ]\n')
    getent.chmod(0o755)
    process = cluster.start("sh", str(RUN_SH), "serve")
    cluster.wait_for("getent hosts localhost")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, cluster.recorded("maskwire-server")) == (143, [])
    cluster.record.with_suffix(".known").touch()
    assert cluster.finish("sh", str(RUN_SH), "serve", CODE="70")[0] == 70
