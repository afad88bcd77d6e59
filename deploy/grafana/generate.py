"""Generate dashboard.json, a Grafana dashboard of maskwire's metrics; --check finds a stale one.

Import it in Grafana (Dashboards > New > Import), or provision it; it asks for the Prometheus data source.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${source}"}
SELECTOR = 'instance=~"$instance"'
COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """One panel: a title and the expressions that it draws, each with a legend."""

    title: str
    unit: str
    """One of Grafana's units."""
    queries: dict[str, str]
    """By legend; $S stands for the selector of the chosen instances."""
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    log: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def quantile(share: float, metric: str, by: str = "") -> str:
    """The quantile of a histogram, over the last five minutes."""
    labels = f"le, instance{', ' + by if by else ''}"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{$S}}[5m])))"


ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("State", "string", {"{{state}}": "maskwire_state{$S} == 1"}, "stat", 6, 4,
              options={"textMode": "name", "colorMode": "background"}),
        Panel("Step", "none", {"step": "maskwire_step{$S}"}, "stat", 6, 4),
        Panel("Newest checkpoint, step", "none", {"step": "maskwire_last_checkpoint_step{$S}"}, "stat", 6, 4),
        Panel("Version", "string", {"{{version}}, torch {{torch}}, {{device}}": "maskwire_build_info{$S}"},
              "stat", 6, 4, options={"textMode": "name"}),
    ],
    "Training": [
        Panel("Loss, nats", "none", {"{{kind}}": "maskwire_loss{$S}"}),
        Panel("Gradient norm", "none", {"before clipping": "maskwire_gradient_norm{$S}"}, log=True),
        Panel("Learning rate", "none", {"rate": "maskwire_learning_rate{$S}"}),
        Panel("Steps per second", "none",
              {"{{outcome}}": "sum by (outcome, instance) (rate(maskwire_steps_total{$S}[1m]))"}),
        Panel("Tokens per second", "none", {"tokens": "rate(maskwire_tokens_total{$S}[1m])"}),
        Panel("Queue", "none", {"requests that wait": "maskwire_queue_length{$S}"}),
    ],
    "Time": [
        Panel("Mean time of a step", "s", {
            "{{phase}}": "rate(maskwire_step_seconds_sum{$S}[5m]) / rate(maskwire_step_seconds_count{$S}[5m])"
        }),
        Panel("Time without progress", "s", {"seconds": "maskwire_computing_seconds{$S}"}),
        Panel("Time of a step, 99th percentile", "s",
              {"{{phase}}": quantile(0.99, "maskwire_step_seconds", "phase")}),
        Panel("Time of a transaction", "s", {
            "median": quantile(0.5, "maskwire_commit_seconds"),
            "99th percentile": quantile(0.99, "maskwire_commit_seconds"),
        }),
        Panel("Time to write a checkpoint", "s",
              {"90th percentile": quantile(0.9, "maskwire_checkpoint_seconds")}),
        Panel("Last start", "s", {"{{phase}}": "maskwire_recovery_seconds{$S}"}, "bargauge"),
        Panel("Calls per second", "none", {
            "{{method}} {{code}} {{reason}}":
                "sum by (method, code, reason, instance) (rate(maskwire_requests_total{$S}[5m])) > 0"
        }),
    ],
    "Evaluation and generation": [
        Panel("Share of the device", "percentunit",
              {"{{use}}": "rate(maskwire_device_seconds_total{$S}[5m])"}),
        Panel("Reads that wait", "none", {"reads": "maskwire_waiting_reads{$S}"}),
        Panel("Reads refused or ended", "none",
              {"{{reason}}": "rate(maskwire_reads_refused_total{$S}[5m])"}),
    ],
    "Object store": [
        Panel("Steps", "none", {"trained": "maskwire_step{$S}", "mirrored": "maskwire_mirror_step{$S}"}),
        Panel("Since the last upload", "s", {"seconds": "maskwire_mirror_age_seconds{$S}"}),
        Panel("Uploads", "Bps", {
            "batches": "rate(maskwire_mirror_uploaded_bytes_total{$S}[5m])",
            "failures": "rate(maskwire_mirror_failures_total{$S}[5m])",
            "failing": "maskwire_mirror_failing{$S}",
        }),
    ],
    "Resources": [
        Panel("Device memory", "bytes", {"{{kind}}": "maskwire_device_memory_bytes{$S}"}),
        Panel("Disk", "bytes", {
            "free": "maskwire_disk_free_bytes{$S}",
            "journal": "maskwire_journal_bytes{$S}",
            "newest checkpoint": "maskwire_checkpoint_bytes{$S}",
        }, log=True),
        Panel("Events lost by telemetry", "none", {"{{subscriber}}": "maskwire_events_dropped_total{$S}"}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard, in Grafana's schema."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + panel.height
            panels.append(drawn(panel, len(panels) + 1, x, y))
            x += panel.width
        y += row[-1].height
    return {
        "uid": "maskwire",
        "title": "maskwire",
        "tags": ["maskwire"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "label": "Data source",
                    "type": "datasource",
                    "query": "prometheus",
                },
                {
                    "name": "instance",
                    "label": "Server",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": {"query": "label_values(maskwire_build_info, instance)", "refId": "instance"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def drawn(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """One panel, in Grafana's schema."""
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": expression.replace("$S", SELECTOR),
            "legendFormat": legend,
        }
        for index, (legend, expression) in enumerate(panel.queries.items())
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.log:
        defaults["custom"] = {"scaleDistribution": {"type": "log", "log": 10}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": panel.options,
        "targets": targets,
    }


def main() -> int:
    """Entry point; exit status 1 when --check finds a stale file."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        current = DASHBOARD.exists() and DASHBOARD.read_text() == text
        if not current:
            print(f"{DASHBOARD} is stale: run {Path(__file__).name} without --check", file=sys.stderr)
        return 0 if current else 1
    DASHBOARD.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
