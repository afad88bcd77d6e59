"""The demo's report: one page that needs no other file and no network."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from demo.generating import Writing

PAGE = Path(__file__).with_name("report.html")
FIGURES = {
    "bits_per_byte_start": "Held out before training, bits per byte",
    "bits_per_byte_end": "Held out after training, bits per byte",
    "bits_per_byte_end_standard_error": "Its standard error",
    "unigram_bits_per_byte": "Byte frequencies alone, bits per byte",
    "steps": "Steps",
    "tokens_per_second": "Tokens per second",
    "parameters": "Parameters",
    "killed_at_step": "Killed after step",
    "restart_seconds": "Seconds until it served again",
    "checkpoint": "Last checkpoint",
}


def write(summary: dict[str, Any], writing: Writing, curve: Path, page: Path) -> None:
    """Write the page. `summary` has the figures of `summary.json`, `curve` is a PNG file."""
    left, was, now, right = map(escape, writing.filled)
    rows = [(label, _shown(summary[name])) for name, label in FIGURES.items()]
    frames = json.dumps(writing.frames, ensure_ascii=False).replace("<", "\\u003c")  # or it ends the script
    page.write_text(
        Template(PAGE.read_text(encoding="utf-8")).substitute(
            bits_start=f"{summary['bits_per_byte_start']:.2f}",
            bits_end=f"{summary['bits_per_byte_end']:.2f}",
            steps=_shown(summary["steps"]),
            parameters=_shown(summary["parameters"]),
            minutes=f"{summary['seconds_training'] / 60:.1f} minutes",
            unigram=f"{summary['unigram_bits_per_byte']:.2f}",
            killed_at=_shown(summary["killed_at_step"]),
            restart_seconds=f"{summary['restart_seconds']:.1f}",
            length=writing.length,
            gap=len(writing.filled[2]),
            left=left,
            was=was,
            now=now,
            right=right,
            samples="".join(f"<pre>{escape(text)}</pre>\n" for text in writing.texts),
            sampled=f"{writing.after:.2f}",
            untrained=f"{writing.before:.2f}",
            real=f"{writing.real:.2f}",
            figures="".join(f"<tr><td>{label}<td>{escape(value)}</tr>\n" for label, value in rows),
            curve=base64.b64encode(curve.read_bytes()).decode(),
            frames=frames,
        ),
        encoding="utf-8",
    )


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
