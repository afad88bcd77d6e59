"""The scripts of the launch files, run with stand-ins for srun, scontrol, the server and the client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_files import parsed

from maskwire.cli import exit_codes

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
RUN_SH = DEPLOY / "kubernetes" / "overlays" / "jobset" / "run.sh"
SBATCH = DEPLOY / "slurm" / "maskwire.sbatch"
REQUEUE = DEPLOY / "slurm" / "requeue.sbatch"


STUBS = {
    # Like srun, it kills what it runs when it gets SIGTERM.
    "srun": 'echo "srun $*" >>"$RECORD"\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\nserver=$!\n'
    'trap "echo killed >>\\"$RECORD\\"; kill -KILL $server" TERM\nwait $server',
    "scancel": 'echo "scancel $*" >>"$RECORD"\nkill -TERM $(sed -n "s/^ready //p" "$RECORD")',
    "scontrol": 'case "$1 $2" in\n  "show hostnames") printf "n1\\nn2\\n" ;;\n'
    '  "show job") echo "JobId=7 JobState=$STATE Partition=all" ;;\n'
    '  *) echo "scontrol $*" >>"$RECORD" ;;\nesac',
    "maskwire-server": 'echo "${0##*/} $*" >>"$RECORD"\ncase $CODE in\n  wait)\n'
    '    trap "echo draining >>\\"$RECORD\\"; exit 0" TERM\n    echo "ready $$" >>"$RECORD"\n'
    "    while :; do sleep 0.05; done ;;\n"
    "  *) exit $CODE ;;\nesac",
}


class Cluster:
    """A folder with the stubs, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.record, self.leader = folder / "record", folder / "maskwire.toml.leader"
        (folder / "bin").mkdir()
        for name, body in {**STUBS, "maskwire": STUBS["maskwire-server"]}.items():
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
    assert parsed(line.split())["ranks"] == 8
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


def test_before_the_time_limit_the_server_drains_and_the_job_is_requeued(cluster: Cluster) -> None:
    process = cluster.start(CODE="wait")
    cluster.wait_for("ready")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert cluster.recorded("scancel") == ["scancel --signal=TERM 7"]
    assert (len(cluster.recorded("draining")), cluster.recorded("killed")) == (1, [])
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


# ---- one process


def requeued(*words: str) -> list[str]:
    return ["bash", str(REQUEUE), *words]


SERVE = requeued("maskwire-server", "serve", "--run-dir=/local/run")
TRAIN = requeued("maskwire", "train", "texts", "--until-step=3")


@pytest.mark.parametrize(
    ("command", "environment", "again"),
    [
        (SERVE, {"CODE": "0"}, True),
        (SERVE, {"CODE": "70"}, True),
        (SERVE, {"CODE": "3"}, False),
        (SERVE, {"CODE": "0", "STATE": "CANCELLED"}, False),
        (SERVE, {"CODE": "70", "SLURM_RESTART_COUNT": "100"}, False),
        (TRAIN, {"CODE": "0"}, False),
        *((TRAIN, {"CODE": str(code)}, code in exit_codes.RETRYABLE) for code in exit_codes.CODES),
    ],
)
def test_a_single_process_is_requeued_where_its_exit_code_says_that_this_helps(
    cluster: Cluster, command: list[str], environment: dict[str, str], again: bool
) -> None:
    code, said = cluster.finish(*command, **environment)
    assert (code, said) == (int(environment["CODE"]), "")
    assert cluster.recorded("scontrol") == ["scontrol requeue 7"] * again
    (ran,) = cluster.recorded("maskwire")
    parsed(ran.split())


def test_usr1_stops_the_process_in_order_and_the_job_is_requeued(cluster: Cluster) -> None:
    process = cluster.start(*SERVE, CODE="wait")
    cluster.wait_for("ready")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert cluster.recorded("draining")
    assert cluster.recorded("scontrol") == ["scontrol requeue 7"]


@pytest.mark.parametrize("command", [SERVE, ["bash", str(SBATCH)]], ids=["one process", "several ranks"])
def test_sigterm_is_not_passed_on_because_slurm_sends_it_to_all_processes(
    cluster: Cluster, command: list[str]
) -> None:
    """A second one would end the server at once, without its last checkpoint."""
    process = cluster.start(*command, CODE="wait")
    cluster.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert not cluster.recorded("draining")
    os.kill(int(cluster.recorded("ready")[0].split()[1]), signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, len(cluster.recorded("draining"))) == (0, 1)
    assert cluster.recorded("scontrol") == ["scontrol requeue 7"]


def test_the_commands_in_the_head_of_the_script_exist() -> None:
    shown = re.findall(r"^#   sbatch .*requeue\.sbatch (.*)", REQUEUE.read_text(), re.MULTILINE)
    assert len(shown) == 2
    assert [parsed(line.split())["config" if "serve" in line else "until_step"] for line in shown] == [
        Path("run-1.toml"), 1000,
    ]  # fmt: skip
