"""The files that start several ranks with Kubernetes and compose: flags and settings exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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
JOBSET = DEPLOY / "kubernetes" / "overlays" / "jobset"
LATEST = "1.32"
NAME = "jobset.sigs.k8s.io/jobset-name"


def serve_options() -> set[str]:
    command: Any = typer.main.get_command(app)
    return {name for option in command.commands["serve"].params for name in option.opts}


def flags(arguments: list[str]) -> set[str]:
    return {each.partition("=")[0] for each in arguments if each.startswith("-")}


def documents() -> dict[str, dict[str, Any]]:
    """The manifests that kustomization.yaml lists, by kind and name."""
    listed = yaml.safe_load((JOBSET / "kustomization.yaml").read_text())["resources"]
    every = [each for name in listed for each in yaml.safe_load_all((JOBSET / name).read_text())]
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
    kustomization = yaml.safe_load((JOBSET / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    assert all((JOBSET / name).is_file() for name in generated["files"])
    Config(**tomllib.loads((JOBSET / "maskwire.toml").read_text()))
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
        ["kubectl", "kustomize", str(JOBSET)], capture_output=True, text=True, check=True, timeout=60
    )
    kinds = sorted(each["kind"] for each in yaml.safe_load_all(done.stdout))
    assert kinds == ["ConfigMap", "JobSet", "NetworkPolicy", "PersistentVolumeClaim", "Service"]
