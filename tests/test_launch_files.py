"""The files that start several ranks with Slurm, Kubernetes and compose: flags, settings, restarts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from maskwire_server.cli import app
from maskwire_server.config import Config

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SBATCH = DEPLOY / "slurm" / "maskwire.sbatch"
LATEST = "1.32"
NAME = "jobset.sigs.k8s.io/jobset-name"


def serve_options() -> set[str]:
    command: Any = typer.main.get_command(app)
    return {name for option in command.commands["serve"].params for name in option.opts}


def flags(arguments: list[str]) -> set[str]:
    return {each.partition("=")[0] for each in arguments if each.startswith("-")}


def documents() -> dict[str, dict[str, Any]]:
    """The manifests that kustomization.yaml lists, by kind and name."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    every = [each for name in listed for each in yaml.safe_load_all((KUBERNETES / name).read_text())]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in every}


def jobs(jobset: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod of each job, by the job's name."""
    return {each["name"]: each["template"]["spec"] for each in jobset["spec"]["replicatedJobs"]}


def pod(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["template"]["spec"]
    return found


def setting_exists(variable: str) -> bool:
    """Whether MASKWIRE_SECTION__KEY is a setting."""
    section, _, key = variable.removeprefix("MASKWIRE_").lower().partition("__")
    field = Config.model_fields.get(section)
    return field is not None and key in type(field.default).model_fields


# ---- compose


def test_the_compose_file_starts_ranks_with_flags_that_exist() -> None:
    base = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    over = yaml.safe_load((DEPLOY / "compose-ranks.yaml").read_text())["services"]
    assert set(over) <= set(base), "it adds to services of compose.yaml"
    server = over["server"]
    assert server["command"][0] == "serve"
    assert flags(server["command"]) <= serve_options()
    assert dict(zip(server["command"][1::2], server["command"][2::2], strict=True)) == {"--ranks": "2"}
    assert server["shm_size"] == "1gb"
    assert all(setting_exists(name) for name in base["server"]["environment"])


def test_a_flag_that_does_not_exist_is_found() -> None:
    assert not flags(["serve", "--rank=2"]) <= serve_options()
    assert not setting_exists("MASKWIRE_SERVE__TLS_CERT")


# ---- Kubernetes


def test_every_pod_starts_the_same_group_with_flags_that_exist() -> None:
    jobset = documents()["JobSet/maskwire"]
    found = jobs(jobset)
    arguments = [pod(job)["containers"][0]["args"] for job in found.values()]
    assert arguments[0] == arguments[1]
    assert arguments[0][0] == "serve"
    assert flags(arguments[0]) <= serve_options()
    given = dict(each.lstrip("-").split("=", 1) for each in arguments[0][1:])
    assert int(given["nodes"]) == sum(job["completions"] for job in found.values())
    assert all(job["completions"] == job["parallelism"] for job in found.values())
    limits = [pod(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for job in found.values()]
    assert limits == [int(given["ranks"])] * 2, "one GPU for each rank"
    host, _, port = given["rendezvous"].rpartition(":")
    assert host == "$(RENDEZVOUS_HOST)"
    subdomain = jobset["spec"]["network"]["subdomain"]
    for job in found.values():
        variables = {each["name"]: each for each in pod(job)["containers"][0]["env"]}
        assert list(variables).index("NAMESPACE") < list(variables).index("RENDEZVOUS_HOST"), (
            "it is used there"
        )
        # JobSet calls a pod <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>
        name = f"maskwire-leader-0-0.{subdomain}.$(NAMESPACE).svc.cluster.local"
        assert variables["RENDEZVOUS_HOST"]["value"] == name
    leader = pod(found["leader"])["containers"][0]
    assert int(port) in [each["containerPort"] for each in leader["ports"]]


def test_every_setting_volume_and_file_of_the_pods_exists() -> None:
    every = documents()
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    assert all((KUBERNETES / name).is_file() for name in generated["files"])
    Config(**tomllib.loads((KUBERNETES / "maskwire.toml").read_text()))
    for job in jobs(every["JobSet/maskwire"]).values():
        of_pod = pod(job)
        (container,) = of_pod["containers"]
        for variable in container["env"]:
            assert variable["name"] in ("NAMESPACE", "RENDEZVOUS_HOST") or setting_exists(variable["name"]), (
                variable
            )
        volumes = {each["name"]: each for each in of_pod["volumes"]}
        assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
        for each in volumes.values():
            if "persistentVolumeClaim" in each:
                assert f"PersistentVolumeClaim/{each['persistentVolumeClaim']['claimName']}" in every
            if "configMap" in each:
                assert each["configMap"]["name"] == generated["name"]
        for path in re.findall(r"/etc/maskwire/(\S+)", " ".join(container["command"] + container["args"])):
            assert path in generated["files"]


def test_the_leader_alone_has_the_run_directory_and_the_keys() -> None:
    every = documents()
    mounts = {
        name: {each["name"]: each["mountPath"] for each in pod(job)["containers"][0]["volumeMounts"]}
        for name, job in jobs(every["JobSet/maskwire"]).items()
    }
    assert mounts["leader"].keys() - mounts["followers"].keys() == {"run", "secrets"}
    variables = {
        each["name"]: each.get("value")
        for each in pod(jobs(every["JobSet/maskwire"])["leader"])["containers"][0]["env"]
    }
    assert mounts["leader"]["run"] == variables["MASKWIRE_RUN__DIR"]
    assert every["PersistentVolumeClaim/maskwire-run"]["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_the_service_leads_to_the_leader_and_the_policy_closes_all_other_ports() -> None:
    every = documents()
    jobset = every["JobSet/maskwire"]
    selector = every["Service/maskwire-front"]["spec"]["selector"]
    assert selector == {NAME: "maskwire", "jobset.sigs.k8s.io/replicatedjob-name": "leader"}
    assert jobset["spec"]["network"]["subdomain"] != "maskwire-front", "JobSet makes a service of that name"
    (front,) = every["Service/maskwire-front"]["spec"]["ports"]
    ports = {
        each["name"]: each["containerPort"] for each in pod(jobs(jobset)["leader"])["containers"][0]["ports"]
    }
    assert ports[front["targetPort"]] == front["port"]
    policy = every["NetworkPolicy/maskwire"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {NAME: "maskwire"}
    among, front_alone = policy["ingress"]
    assert among == {"from": [{"podSelector": policy["podSelector"]}]}
    assert front_alone == {"ports": [{"port": "grpc"}]}


def test_what_needs_a_person_is_not_restarted() -> None:
    jobset = documents()["JobSet/maskwire"]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "needsAPerson", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    for job in jobs(jobset).values():
        (rule,) = job["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob"
        assert rule["onExitCodes"]["values"] == [2, 3, 4]
        assert rule["onExitCodes"]["containerName"] == pod(job)["containers"][0]["name"]


def test_the_manifests_are_valid_for_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate: pip install kubernetes-validate"
    )
    every = documents()
    core = [each for each in every.values() if each["kind"] != "JobSet"]
    for name, job in jobs(every["JobSet/maskwire"]).items():
        core.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job})
    assert len(core) == 5
    for each in core:
        kubernetes_validate.validate(each, LATEST, strict=True)
    core[-1]["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(core[-1], LATEST, strict=True)


def test_the_jobset_is_valid_under_its_documented_fields() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install kubernetes-validate")
    schema = json.loads((ROOT / "tests" / "fixtures" / "jobset-v1alpha2.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    jobset = documents()["JobSet/maskwire"]
    assert [error.message for error in check.iter_errors(jobset)] == []
    targets = jobset["spec"]["successPolicy"]["targetReplicatedJobs"]
    assert set(targets) <= set(jobs(jobset))
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert len(list(check.iter_errors(jobset))) == 1


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_joins_the_manifests() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=True, timeout=60
    )
    kinds = sorted(each["kind"] for each in yaml.safe_load_all(done.stdout))
    assert kinds == ["ConfigMap", "JobSet", "NetworkPolicy", "PersistentVolumeClaim", "Service"]


# ---- commands that replace srun, scontrol and the server

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
    assert flags(line.split()) <= serve_options()
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
    process = cluster.start("sh", str(KUBERNETES / "run.sh"), "serve", "--ranks=8", CODE="wait")
    cluster.wait_for("ready")
    assert cluster.recorded("maskwire-server") == ["maskwire-server serve --ranks=8"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert cluster.recorded("draining")
    assert process.returncode == 143
    assert cluster.finish("sh", str(KUBERNETES / "run.sh"), CODE="3")[0] == 3


def test_a_pod_waits_for_the_name_of_the_leader_and_can_be_stopped_meanwhile(cluster: Cluster) -> None:
    getent = cluster.record.parent / "bin" / "getent"
    getent.write_text('#!/bin/sh\necho "getent $*" >>"$RECORD"\n[ -e "$RECORD.known" ]\n')
    getent.chmod(0o755)
    process = cluster.start("sh", str(KUBERNETES / "run.sh"), "serve")
    cluster.wait_for("getent hosts localhost")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, cluster.recorded("maskwire-server")) == (143, [])
    cluster.record.with_suffix(".known").touch()
    assert cluster.finish("sh", str(KUBERNETES / "run.sh"), "serve", CODE="70")[0] == 70
