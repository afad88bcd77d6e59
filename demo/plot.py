"""The learning curve as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from maskwire.results import EvalResult

INK, MUTED, BLUE, ORANGE, RED = "#1f2933", "#9aa5b1", "#2f6fb2", "#e07b39", "#c0392b"


def learning_curve(
    metrics: Path, points: list[EvalResult], picture: Path, *, unigram: float, killed_at: int
) -> None:
    """Draw the training loss of a metrics file and held-out points, in bits per byte."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [(line["step"], line["loss"] / math.log(2)) for line in lines if line.get("loss") is not None]
    x, y = (np.array(column) for column in zip(*steps, strict=True))
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    axes.plot(x, y, color=BLUE, alpha=0.18, linewidth=0.8)
    span = max(1, len(y) // 40)
    smooth = np.convolve(y, np.ones(span) / span, mode="valid")
    axes.plot(x[span - 1 :], smooth, color=BLUE, linewidth=1.8, label="training, smoothed")
    axes.errorbar(
        [point.step for point in points],
        [point.bits_per_token for point in points],
        yerr=[2 * (point.standard_error or 0) / math.log(2) for point in points],
        color=ORANGE,
        fmt="o",
        markersize=5,
        capsize=3,
        label="held out, ± 2 standard errors",
        zorder=3,
    )
    axes.axhline(unigram, color=MUTED, linestyle="--", linewidth=1.2)
    axes.text(x[-1], unigram + 0.05, f"byte frequencies alone: {unigram:.2f}", ha="right", color=MUTED)
    axes.axvline(killed_at, color=RED, linestyle=":", linewidth=1.2)
    axes.text(killed_at, axes.get_ylim()[1], " kill -9, restart", va="top", color=RED)
    axes.annotate(
        f"{points[-1].bits_per_token:.2f}",
        (points[-1].step, points[-1].bits_per_token),
        xytext=(-6, -16),
        textcoords="offset points",
        ha="right",
        color=ORANGE,
    )
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("bits per byte", color=INK)
    axes.set_title("maskwire: a masked model of Python's standard library", loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=max(0, min(y.min(), 2.5) - 0.3))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
