"""The commands in pages about clusters: run where that needs no cluster, else parsed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from launch_files import ROOT, parsed

PAGES = [ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "pipelines.md"]
CLUSTER = ROOT / "docs" / "tutorials" / "cluster.md"
"""Its commands without a language are run by tests/rpc/test_tutorials.py."""
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


def commands(page: Path, kind: str = "") -> list[str]:
    """The lines of the blocks of a kind; by default those that have no language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if language == kind for line in block.splitlines()]


def check_kubectl(line: str) -> None:
    words = shlex.split(line.partition(" | ")[0])
    kind, options = words[1], words[2:]
    if "--" in words:
        parsed(words[words.index("--") + 1 :])
    elif kind == "kustomize":
        assert rendered(ROOT / options[0])
    elif kind == "apply":
        assert rendered(ROOT / options[options.index("-k") + 1])
    elif kind == "create" and "-f" in options:
        assert (ROOT / options[1]).is_file()
    elif kind == "create":
        pass  # test_the_secrets_are_those_that_the_pods_mount
    else:
        explained = subprocess.run(
            ["kubectl", kind, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for flag in re.findall(r"(?<= )--?[a-z][a-z-]*", line.partition(" | ")[0]):
            assert f"{flag}=" in explained or f"{flag}," in explained, (flag, kind)
        for name in re.findall(r"(?:statefulset|job|pod)[ /](\S+)", line):
            assert name in ("maskwire", "maskwire-0", "maskwire-train"), name


def check_sbatch(line: str) -> None:
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file()
    parsed(words[script + 1 :])


def check_ranks(line: str) -> None:
    given = dict(word.split("=", 1) for word in shlex.split(line) if not word.startswith("-") and "=" in word)
    script = (ROOT / shlex.split(line)[-1]).read_text()
    assert all(f"${{{name}:?" in script for name in given), "tests/test_launch_scripts.py runs it"


def check_pipeline(line: str) -> None:
    words = shlex.split(line)
    help_text = subprocess.run(
        [sys.executable, str(ROOT / words[1]), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", help_text))


def check_secrets(line: str) -> None:
    assert "deploy/secrets.sh" in line  # test_the_secrets_are_those_that_the_pods_mount runs it


CHECKS: dict[str, Callable[[str], None]] = {
    "kubectl": check_kubectl,
    "sbatch": check_sbatch,
    "python": check_pipeline,
    "CONTAINER_UID=$(id": check_secrets,
    "RUN_DIR=/local/run-1": check_ranks,
    "maskwire": lambda line: print(parsed(shlex.split(line))),
}


def rendered(folder: Path) -> list[dict[str, object]]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@needs_kubectl
@pytest.mark.parametrize(
    "line", [*(line for page in PAGES for line in commands(page)), *commands(CLUSTER, "sh")]
)
def test_a_command_in_the_docs_exists(line: str) -> None:
    CHECKS[line.split()[0]](line)


@needs_kubectl
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_secrets_are_those_that_the_pods_mount(tmp_path: Path) -> None:
    """The page's commands for certificates and secrets, run as they stand, without a cluster."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "secrets.sh", tmp_path / "deploy")
    made: dict[str, set[str]] = {}
    lines = [line for line in commands(PAGES[0]) if "secrets.sh" in line or "create secret" in line]
    assert len(lines) == 7
    for line in lines:
        command = line.partition(" | ")[0]
        if "create secret" in command:
            command = f"{command.removesuffix(' --dry-run=client -o yaml')} --dry-run=client -o yaml"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "KUBECONFIG": str(tmp_path / "none")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if "create secret" in command:
            secret = yaml.safe_load(done.stdout)
            made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == {
        "maskwire-server": {"ca.crt", "server.crt", "server.key", "read.token", "train.token", "admin.token"},
        "maskwire-client": {"ca.crt", "client.crt", "client.key", "read.token", "train.token"},
        "maskwire-admin": {"ca.crt", "client.crt", "client.key", "admin.token"},
        "maskwire-object-store": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    }
    names = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", "secrets/server/server.crt"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "DNS:maskwire," in names, "the name by which the job calls the server"
