"""Alerts, dashboard and run book name metrics, settings and commands that exist, and the alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from maskwire.cli import app as client_app
from maskwire_server.cli import app as server_app
from maskwire_server.config import Config
from maskwire_server.telemetry.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
SERIES = {
    name
    for metric in METRICS
    for name in (
        [metric.name]
        if metric.kind != "histogram"
        else [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
    )
}
LABELS = {metric.name: {*metric.labels, "instance", "le"} for metric in METRICS}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def expressions() -> dict[str, str]:
    """Of the alerts, and of the dashboard."""
    panels = json.loads((GRAFANA / "dashboard.json").read_text())["panels"]
    drawn = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", [])
    }
    return {**{name: rule["expr"] for name, rule in alerts().items()}, **drawn}


def promtool(*arguments: str, folder: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run([found, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_promtool_accepts_the_rules_and_the_scrape_configuration() -> None:
    done = promtool("check", "rules", "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_for_its_fault_and_none_for_a_healthy_server(tmp_path: Path) -> None:
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    assert {name for name in alerts() if name not in tested} == set()
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    rules = (tmp_path / "alerts.yml").read_text()
    for harmless in (
        "maskwire_disk_free_bytes < 2e9", 'state="halted"} == 1', "maskwire_waiting_reads)[10m:]) > 0",
        'state="serving"}[10m]) == 1', "offset 10m == 1",
    ):  # fmt: skip
        assert harmless in rules
        broken = rules.replace(harmless, harmless.rpartition(" ")[0] + " -1")
        (tmp_path / "alerts.yml").write_text(broken)
        assert promtool("test", "rules", "alerts_test.yml", folder=tmp_path).returncode != 0, harmless


@pytest.mark.parametrize("name", expressions())
def test_each_metric_and_label_of_an_expression_is_exposed(name: str) -> None:
    expression = expressions()[name]
    named = re.findall(r"\b(maskwire_\w+)(?:\{([^}]*)\})?", expression)
    assert named or "process_start_time_seconds" in expression or "up{" in expression
    for series, selector in named:
        assert series in SERIES
        metric = re.sub(r"_(bucket|sum|count)$", "", series) if series not in LABELS else series
        used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector))
        assert used <= LABELS[metric] | {"job"}, series


def test_the_dashboard_is_what_its_script_generates_and_shows_every_metric() -> None:
    done = subprocess.run(
        [sys.executable, str(GRAFANA / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.dumps(json.loads((GRAFANA / "dashboard.json").read_text())["panels"])
    assert {metric.name for metric in METRICS if metric.name not in shown} == set()


def test_a_stale_dashboard_is_found(tmp_path: Path) -> None:
    shutil.copytree(GRAFANA, tmp_path, dirs_exist_ok=True)
    (tmp_path / "dashboard.json").write_text(
        (tmp_path / "dashboard.json").read_text().replace("Loss", "Lost")
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "stale" in done.stderr


def test_each_alert_has_an_entry_in_the_run_book_and_each_entry_an_alert() -> None:
    entries = dict(re.findall(r"^### (Maskwire\w+)\n(.+?)(?=\n#|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert entries.keys() == alerts().keys()
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"
        assert "- Look:" in entries[name], name
        assert "- Do:" in entries[name], name


def test_the_settings_and_commands_of_the_page_exist() -> None:
    sections = {name: type(field.default).model_fields for name, field in Config.model_fields.items()}
    settings = re.findall(rf"`({'|'.join(sections)})\.(\w+)", PAGE)
    assert len(settings) > 10
    for section, key in settings:
        assert key in sections[section], f"{section}.{key}"
    commands = {"maskwire": typer.main.get_command(client_app),
                "maskwire-server": typer.main.get_command(server_app)}  # fmt: skip
    used = re.findall(r"`(maskwire(?:-server)?) ([a-z][^`]*)`", PAGE)
    assert len(used) > 15
    for program, line in used:
        command: Any = commands[program]
        words = line.split()
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {name for option in command.params for name in option.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line
