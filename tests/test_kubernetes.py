"""deploy/kubernetes: what kustomize makes of each folder is valid, closed, and starts what exists."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_files import KUBERNETES, ROOT, VERSION, UsageError, client_variables, parsed, settings

from maskwire.cli import exit_codes

Manifests = dict[str, dict[str, Any]]
FIXTURES = ROOT / "tests" / "fixtures"
SERVER = ("cpu", "gpu", "monitored")
CLOSING_SECONDS = 15  # after serve.drain_seconds, as the StatefulSet's comment says

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


def render(folder: Path) -> Manifests:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    """Each folder that a user applies, and the component for metrics on top of the overlay for GPUs."""
    folder = tmp_path_factory.mktemp("kustomize").resolve()
    above = Path(os.path.relpath(KUBERNETES, folder))
    (folder / "kustomization.yaml").write_text(
        f"resources: [{above}/overlays/gpu]\ncomponents: [{above}/components/monitoring]\n"
    )
    mirrored = tmp_path_factory.mktemp("mirrored").resolve()
    above = Path(os.path.relpath(KUBERNETES, mirrored))
    (mirrored / "kustomization.yaml").write_text(
        f"resources: [{above}/overlays/cpu]\ncomponents: [{above}/components/mirror]\n"
    )
    folders = {
        "mirrored": mirrored,
        "cpu": KUBERNETES / "overlays" / "cpu",
        "gpu": KUBERNETES / "overlays" / "gpu",
        "monitored": folder,
        "train": KUBERNETES / "train",
    }
    return {name: render(each) for name, each in folders.items()}


def pod(manifests: Manifests) -> dict[str, Any]:
    workload = manifests.get("StatefulSet") or manifests["Job"]
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def container(manifests: Manifests) -> dict[str, Any]:
    (found,) = pod(manifests)["containers"]
    return dict(found)


def environment(manifests: Manifests) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(manifests)["env"] if "value" in each}


def test_every_object_is_valid_for_kubernetes(rendered: dict[str, Manifests]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    checked = [
        each
        for manifests in rendered.values()
        for each in manifests.values()
        if "coreos" not in each["apiVersion"]
    ]
    assert len(checked) == 4 * 5 + 1
    for each in checked:
        kubernetes_validate.validate(each, VERSION, strict=True)
    wrong = copy.deepcopy(rendered["cpu"]["StatefulSet"])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]["commands"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_the_service_monitor_fits_its_documented_fields_and_finds_the_service(
    rendered: dict[str, Manifests],
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((FIXTURES / "service-monitor-v1.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    manifests = rendered["monitored"]
    monitor = copy.deepcopy(manifests["ServiceMonitor"])
    assert [error.message for error in check.iter_errors(monitor)] == []
    labels = manifests["Service"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {each["name"]: each["targetPort"] for each in manifests["Service"]["spec"]["ports"]}
    opened = {each["name"]: each["containerPort"] for each in container(manifests)["ports"]}
    (endpoint,) = monitor["spec"]["endpoints"]
    address = environment(manifests)["MASKWIRE_TELEMETRY__METRICS_ADDRESS"]
    assert address == f"0.0.0.0:{opened[ports[endpoint['port']]]}"
    rules = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert [rule["ports"] for rule in rules] == [[{"port": "grpc"}], [{"port": "metrics"}]]
    endpoint["ports"] = endpoint.pop("port")
    assert len(list(check.iter_errors(monitor))) >= 1


def test_the_operator_gets_the_alerts_for_the_job_that_it_scrapes(rendered: dict[str, Manifests]) -> None:
    manifests = rendered["monitored"]
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    rule = manifests["PrometheusRule"]
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == alerts
    # Without a jobLabel the operator calls the job after the Service.
    assert "jobLabel" not in manifests["ServiceMonitor"]["spec"]
    jobs = set(re.findall(r'job="([^"]*)"', json.dumps(alerts).replace('\\"', '"')))
    assert jobs == {manifests["Service"]["metadata"]["name"]}


def test_a_mirrored_server_reaches_its_store_and_may_take_hours_to_restore(
    rendered: dict[str, Manifests],
) -> None:
    manifests = rendered["mirrored"]
    (rule,) = manifests["NetworkPolicy"]["spec"]["egress"]
    assert {each["port"] for each in rule["ports"]} == {53, 443}
    assert rendered["cpu"]["NetworkPolicy"]["spec"]["egress"] == []
    probe = container(manifests)["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] == 24 * 3600
    (given,) = container(manifests)["envFrom"]
    assert given["secretRef"]["name"] in (ROOT / "docs" / "kubernetes.md").read_text()


@pytest.mark.parametrize("name", SERVER)
def test_the_server_starts_with_flags_and_settings_that_exist(
    rendered: dict[str, Manifests], name: str
) -> None:
    manifests = rendered[name]
    started = parsed(["maskwire-server", *container(manifests)["args"]])
    mounts = {each["mountPath"]: each["name"] for each in container(manifests)["volumeMounts"]}
    volumes = {each["name"]: each for each in pod(manifests)["volumes"]}
    configuration = volumes[mounts[str(started["config"].parent)]]["configMap"]["name"]
    assert manifests["ConfigMap"]["metadata"]["name"] == configuration
    file = tomllib.loads(manifests["ConfigMap"]["data"][started["config"].name])
    from_file = {
        f"MASKWIRE_{section}__{key}".upper(): value
        for section, keys in file.items()
        for key, value in keys.items()
    }
    config = settings({**from_file, **environment(manifests)})
    assert config.run.dir.parent == Path("/run-dir")
    assert str(config.run.dir.parent) in mounts, "the run is on the volume"
    assert str(config.serve.socket).startswith("/tmp/")
    assert config.serve.tls_certificate is not None, "and settings that need one another are all there"
    grace = pod(manifests)["terminationGracePeriodSeconds"]
    assert grace == config.serve.drain_seconds + CLOSING_SECONDS
    port = config.serve.address.rpartition(":")[2]
    assert int(port) in [each["containerPort"] for each in container(manifests)["ports"]]


@pytest.mark.parametrize("name", SERVER)
def test_probes_ask_for_what_they_decide(rendered: dict[str, Manifests], name: str) -> None:
    probes = {
        kind: parsed(container(rendered[name])[f"{kind}Probe"]["exec"]["command"])
        for kind in ("startup", "liveness", "readiness")
    }
    asked = {kind: found["service"] for kind, found in probes.items()}
    assert asked == {"startup": "liveness", "liveness": "liveness", "readiness": ""}
    socket = environment(rendered[name])["MASKWIRE_SERVE__SOCKET"]
    assert {found["target"] for found in probes.values()} == {f"unix:{socket}"}
    for kind, found in probes.items():
        probe = container(rendered[name])[f"{kind}Probe"]
        assert found["retry_for"] < probe["timeoutSeconds"], "it answers before it is ended"


@pytest.mark.parametrize("name", [*SERVER, "train"])
def test_a_pod_has_no_rights_beyond_its_volumes(rendered: dict[str, Manifests], name: str) -> None:
    of_pod, inside = pod(rendered[name]), container(rendered[name])
    assert of_pod["automountServiceAccountToken"] is False
    assert of_pod["securityContext"]["runAsNonRoot"] is True
    image_user = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert image_user is not None
    user = int(image_user[1])
    assert [of_pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user] * 3
    assert of_pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {"cpu", "memory"} <= inside["resources"]["requests"].keys()
    assert "memory" in inside["resources"]["limits"]


@pytest.mark.parametrize("name", [*SERVER, "train"])
def test_keys_and_tokens_are_files_of_a_folder_that_follows_the_secret(
    rendered: dict[str, Manifests], name: str
) -> None:
    for each in container(rendered[name])["volumeMounts"]:
        assert "subPath" not in each, "Kubernetes never updates it"
    for each in container(rendered[name])["env"]:
        assert "secretKeyRef" not in each.get("valueFrom", {})
    (volume,) = [each for each in pod(rendered[name])["volumes"] if "secret" in each]
    (mount,) = [each for each in container(rendered[name])["volumeMounts"] if each["name"] == volume["name"]]
    made = {
        f"{mount['mountPath']}/{found}"
        for found in re.findall(
            r"[\w.]+\.(?:crt|key|token)", section(volume["secret"]["secretName"].removeprefix("maskwire-"))
        )
    }
    used = {value for value in environment(rendered[name]).values() if value.startswith(mount["mountPath"])}
    assert len(used) >= 4
    assert used <= made, "deploy/secrets.sh makes them"


def section(folder: str) -> str:
    """The line in which deploy/secrets.sh lists the files that it makes in a folder."""
    (line,) = re.findall(rf"^# +FOLDER/{folder}/ +(.*)", (ROOT / "deploy" / "secrets.sh").read_text(), re.M)
    return str(line)


def test_the_job_is_tried_again_where_that_helps_and_under_its_own_name(
    rendered: dict[str, Manifests],
) -> None:
    manifests = rendered["train"]
    inside = container(manifests)
    command = parsed([*inside["command"], *inside["args"]])
    assert command["name"] == "$(JOB_NAME)"
    (named,) = [each for each in inside["env"] if each["name"] == "JOB_NAME"]
    assert named["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    assert [str(path) for path in command["paths"]] == ["/data"]
    assert environment(manifests).keys() <= client_variables()
    ignored, failed = manifests["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert (ignored["action"], failed["action"]) == ("Ignore", "FailJob")
    assert set(failed["onExitCodes"]["values"]) == exit_codes.CODES.keys() - {0} - exit_codes.RETRYABLE
    assert failed["onExitCodes"]["containerName"] == inside["name"]


def test_the_job_reaches_the_server_and_others_do_not(rendered: dict[str, Manifests]) -> None:
    job, server = rendered["train"], rendered["cpu"]
    target = environment(job)["MASKWIRE_TARGET"]
    service = server["Service"]
    (port,) = service["spec"]["ports"]
    assert target == f"{service['metadata']['name']}:{port['port']}"
    labels = server["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        service["spec"]["selector"],
        server["StatefulSet"]["spec"]["selector"]["matchLabels"],
        server["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        server["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
        assert not selector.items() <= job["Job"]["spec"]["template"]["metadata"]["labels"].items()
    policy = server["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not policy.get("egress")
    ((peer,),) = [rule["from"] for rule in policy["ingress"]]
    allowed = peer["podSelector"]["matchLabels"]
    assert allowed.items() <= job["Job"]["spec"]["template"]["metadata"]["labels"].items()
    assert not allowed.items() <= labels.items()


def test_a_run_has_one_server_and_keeps_its_volume(rendered: dict[str, Manifests]) -> None:
    for name in SERVER:
        spec = rendered[name]["StatefulSet"]["spec"]
        assert spec["replicas"] == 1
        (claim,) = spec["volumeClaimTemplates"]
        assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
        assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
        budget = rendered[name]["PodDisruptionBudget"]["spec"]
        assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (0, "AlwaysAllow")
    gpu = container(rendered["gpu"])
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert environment(rendered["gpu"])["MASKWIRE_SERVE__DEVICE"] == "cuda"


def test_a_flag_or_setting_that_does_not_exist_is_found() -> None:
    with pytest.raises(UsageError, match="--until-steps"):
        parsed(["maskwire", "train", "/data", "--until-steps=3"])
    with pytest.raises(UsageError, match="no command 'chk'"):
        parsed(["maskwire-server", "chk"])
    with pytest.raises(Exception, match=r"serve\.tls_cert: unknown key"):
        settings({"MASKWIRE_SERVE__TLS_CERT": "/secrets/server.crt"})
