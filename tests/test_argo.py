"""examples/pipelines/argo.yaml: fields, pods and commands exist, stages come in order, scripts work."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_files import ROOT, VERSION, client_variables, parsed

from maskwire.cli import exit_codes

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "pipelines" / "argo.yaml").read_text())
TEMPLATES = {each["name"]: each for each in WORKFLOW["spec"]["templates"]}
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "argo-workflow-v1alpha1.json").read_text())


def parameters(given: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in given.get("parameters", [])}


def stages() -> list[tuple[str, dict[str, Any]]]:
    """The name of each stage, in order, and its container with Argo's parameters put in."""
    found = []
    for (step,) in TEMPLATES["pipeline"]["steps"]:  # one after the other
        template = TEMPLATES[step["template"]]
        given = parameters(step.get("arguments", {}))
        assert given.keys() == parameters(template.get("inputs", {})).keys()
        values = {"workflow.name": "maskwire-abc12"}
        values |= {f"inputs.parameters.{name}": value for name, value in given.items()}
        spec = parameters(WORKFLOW["spec"]["arguments"])
        values |= {f"workflow.parameters.{name}": value for name, value in spec.items()}
        text = json.dumps(template.get("container") or template["script"])
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", value)
        assert "{{" not in text, "no such parameter"
        found.append((step["name"], json.loads(text)))
    return found


def commands(container: dict[str, Any]) -> list[list[str]]:
    """The commands of maskwire that a container runs."""
    words = [*container["command"], *container.get("args", [])]
    if words[0] != "sh":
        return [words] if words[0] == "maskwire" else []
    if '"$@"' in words[2]:
        return [words[4:]]
    lines = [re.split(r"\|\|| >", line)[0].removeprefix("exec ") for line in words[2].splitlines()]
    return [shlex.split(line) for line in lines]


def test_the_stages_come_in_order_and_their_commands_exist() -> None:
    ran = [(name, parsed(command)) for name, each in stages() for command in commands(each)]
    assert [name for name, _ in ran] == [
        "prepare-texts", "prepare-held-out", "train", "save", "save", "evaluate", "export",
    ]  # fmt: skip
    assert [name for name, _ in stages()][-2:] == ["gate", "export"]
    assert [each["name"] for name, each in ran if name in ("save", "export") and "name" in each] == [
        "maskwire-abc12", "maskwire-abc12",
    ]  # fmt: skip
    values = dict(ran)
    assert values["train"]["paths"] == [str(values["prepare-texts"]["out"])]
    assert values["evaluate"]["paths"] == [str(values["prepare-held-out"]["out"])]
    assert (values["train"]["until_step"], values["train"]["name"]) == (1000, "maskwire-abc12")
    assert all(found["as_json"] for _, found in ran)


def test_the_workflow_fits_argo_s_documented_fields() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(SCHEMA)
    assert [error.message for error in check.iter_errors(WORKFLOW)] == []
    wrong = copy.deepcopy(WORKFLOW)
    wrong["spec"]["retryStrategy"]["retries"] = 3
    wrong["spec"]["templates"][1]["arguments"] = {}
    assert len(list(check.iter_errors(wrong))) == 2


def test_every_stage_is_a_valid_pod_with_no_rights_beyond_its_volumes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = WORKFLOW["spec"]
    claims = [{"name": each["metadata"]["name"], "emptyDir": {}} for each in spec["volumeClaimTemplates"]]
    containers = []
    for name, each in stages():
        container = {key: value for key, value in each.items() if key != "source"}
        containers.append({"name": name, **container})
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        variables = {item["name"] for item in container.get("env", [])}
        assert name == "gate" or variables <= client_variables()
        mounted = {item["name"] for item in container["volumeMounts"]}
        assert mounted <= {item["name"] for item in [*spec["volumes"], *claims]}
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": spec["podMetadata"]["labels"]},
        "spec": {
            "containers": containers, "volumes": [*spec["volumes"], *claims],
            "securityContext": spec["securityContext"],
            "automountServiceAccountToken": spec["automountServiceAccountToken"],
        },
    }  # fmt: skip
    kubernetes_validate.validate(pod, VERSION, strict=True)
    for claim in spec["volumeClaimTemplates"]:
        whole = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}
        kubernetes_validate.validate(whole, VERSION, strict=True)


def test_a_stage_is_tried_again_where_that_helps() -> None:
    codes = re.search(r"in \[([\d, ]+)\]", WORKFLOW["spec"]["retryStrategy"]["expression"])
    assert codes is not None
    assert set(map(int, codes[1].split(","))) == exit_codes.RETRYABLE


# ---- the scripts


GOOD = {"digest": "a1", "bits_per_token": 2.3, "standard_error": 0.05}


@pytest.mark.parametrize(
    ("evaluation", "step", "said"),
    [
        (GOOD, 1000, "2.4443 bits"),
        (GOOD | {"bits_per_token": 2.45}, 1000, "not good enough"),
        (GOOD, 1001, "the checkpoint is of step 1001: somebody else"),
        (GOOD | {"digest": "b2"}, 1000, "not of the checkpoint: somebody else"),
        (GOOD | {"bits_per_token": None, "standard_error": None}, 1000, "not finite"),
    ],
)
def test_the_gate_opens_for_a_checkpoint_below_the_bound(
    tmp_path: Path, evaluation: dict[str, Any], step: int, said: str
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    saved = [{"name": "other", "step": 1000, "digest": "b2"}]
    saved.append({"name": "maskwire-abc12", "step": step, "digest": "a1"})
    (tmp_path / "checkpoints.json").write_text(json.dumps(saved))
    gate = dict(stages())["gate"]
    done = subprocess.run(
        [sys.executable, "-c", gate["source"].replace("/pipeline", str(tmp_path))],
        env={**os.environ, **{each["name"]: each["value"] for each in gate["env"]}},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said in done.stdout + done.stderr
    assert done.returncode == (0 if "bits" in said else 1)


@pytest.mark.parametrize(("save", "listed", "code"), [(0, 0, 0), (1, 0, 0), (1, 3, 3), (3, 0, 3), (6, 0, 6)])
def test_the_save_is_repeatable_and_keeps_the_exit_code(
    tmp_path: Path, save: int, listed: int, code: int
) -> None:
    (tmp_path / "maskwire").write_text(
        f'#!/bin/sh\necho "$2 $3" >>{tmp_path}/log\n[ $2 = save ] && exit {save}\necho "[]"\nexit {listed}\n'
    )
    (tmp_path / "maskwire").chmod(0o755)
    stage = dict(stages())["save"]
    done = subprocess.run(
        [*stage["command"], *[each.replace("/pipeline", str(tmp_path)) for each in stage["args"]]],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == code
    log = (tmp_path / "log").read_text().splitlines()
    assert log == ["save maskwire-abc12", "list --json"][: 1 if save > 1 else 2]
    assert save > 1 or json.loads((tmp_path / "checkpoints.json").read_text()) == []
