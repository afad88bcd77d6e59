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
import yaml
from launch_files import ROOT, VERSION, client_variables, parsed, settings

from maskwire_server.config import Config

DEPLOY = ROOT / "deploy"
JOBSET = DEPLOY / "kubernetes" / "overlays" / "jobset"
NAME = "jobset.sigs.k8s.io/jobset-name"


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


# ---- compose


def services(path: Path = ROOT / "compose.yaml") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    return found


def test_the_compose_file_starts_ranks_with_flags_that_exist() -> None:
    over = services(DEPLOY / "compose-ranks.yaml")
    assert set(over) <= set(services()), "it adds to services of compose.yaml"
    server = over["server"]
    assert parsed(["maskwire-server", *server["command"]])["ranks"] == 2
    assert server["shm_size"] == "1gb"


def test_the_compose_file_sets_what_exists_and_its_job_trains_over_mutual_tls() -> None:
    server, job = services()["server"], services()["train"]
    config = settings(server["environment"])
    mounted = {each.removesuffix(":ro").rpartition(":")[2] for each in server["volumes"]}
    assert {"/secrets", "/run-dir"} <= mounted
    files = [config.serve.tls_certificate, config.serve.tls_key, config.serve.tls_client_ca]
    assert all(path is not None and path.parent == Path("/secrets") for path in files)
    command = parsed([*job["entrypoint"], *job["command"]])
    assert command["until_step"] == 1000
    assert job["environment"].keys() <= client_variables()
    assert {"MASKWIRE_CERT", "MASKWIRE_KEY", "MASKWIRE_TOKEN_FILE"} <= job["environment"].keys()
    assert job["environment"]["MASKWIRE_TARGET"] == "server:50051"
    assert parsed(server["healthcheck"]["test"][1:])["service"] == ""


def test_the_profile_monitoring_reads_what_the_server_writes() -> None:
    every = services()
    watching = {name for name, each in every.items() if each.get("profiles") == ["monitoring"]}
    assert watching == {"prometheus", "grafana", "tensorboard"}
    environment = every["server"]["environment"]
    assert environment["MASKWIRE_TELEMETRY__TENSORBOARD"] == "true"
    image = dict(re.findall(r"(MASKWIRE_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    assert every["tensorboard"]["command"][0] == f"--logdir={image['MASKWIRE_RUN__DIR']}/tensorboard"
    (file,) = re.findall(r"--config.file=/etc/maskwire/(\S+)", every["prometheus"]["command"][0])
    assert "./deploy:/etc/maskwire:ro" in every["prometheus"]["volumes"]
    scraped = yaml.safe_load((DEPLOY / file).read_text())
    port = environment["MASKWIRE_TELEMETRY__METRICS_ADDRESS"].rpartition(":")[2]
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    for volume in every["grafana"]["volumes"][1:3]:
        assert (ROOT / volume.partition(":")[0]).is_file()
    dashboards = yaml.safe_load((DEPLOY / "compose" / "grafana-dashboards.yml").read_text())
    assert (
        f"./deploy/grafana:{dashboards['providers'][0]['options']['path']}:ro" in every["grafana"]["volumes"]
    )


def test_no_service_has_rights_or_ports_beyond_its_need() -> None:
    for name, each in services().items():
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert each.get("read_only") is True or name == "grafana"
        assert all(port.startswith("127.0.0.1:") for port in each.get("ports", [])), name
    assert not any(":9464" in port for port in services()["server"]["ports"]), (
        "metrics have no access control"
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt install prometheus")
@pytest.mark.skipif(not (DEPLOY / "prometheus" / "alerts.yml").exists(), reason="there are no alerts")
def test_prometheus_accepts_the_scrape_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "compose" / "prometheus.yml")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- Kubernetes


def test_every_pod_starts_the_same_group_with_flags_that_exist() -> None:
    jobset = documents()["JobSet/maskwire"]
    found = jobs(jobset)
    arguments = [pod(job)["containers"][0]["args"] for job in found.values()]
    assert arguments[0] == arguments[1]
    given = parsed(["maskwire-server", *arguments[0]])
    assert given["nodes"] == sum(job["completions"] for job in found.values())
    assert all(job["completions"] == job["parallelism"] for job in found.values())
    limits = [pod(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for job in found.values()]
    assert limits == [given["ranks"]] * 2, "one GPU for each rank"
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
        variables = {each["name"]: each.get("value", "") for each in container["env"]}
        settings({name: value for name, value in variables.items() if name.startswith("MASKWIRE_")})
        assert {name for name in variables if not name.startswith("MASKWIRE_")} == {
            "NAMESPACE",
            "RENDEZVOUS_HOST",
        }
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
        assert rule["onExitCodes"]["values"] == [2, 3, 4, 9]
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
        kubernetes_validate.validate(each, VERSION, strict=True)
    core[-1]["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(core[-1], VERSION, strict=True)


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
