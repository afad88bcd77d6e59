"""The benchmarks as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row

INK, MUTED, GREEN, ORANGE, BLUE = "#1f2933", "#9aa5b1", "#3a8f5c", "#e07b39", "#2f6fb2"
COLORS = {"peer": MUTED, "bernoulli": GREEN, "linear": BLUE, "quadratic": ORANGE}
NAMES = {
    "peer": "x-transformers, weight mended",
    "bernoulli": "Bernoulli masks and 1/t, as in dLLM",
    "linear": "maskwire, linear (the default)",
    "quadratic": "maskwire, quadratic",
}


def pyplot() -> Any:
    """matplotlib, imported only to draw: a machine that only measures may lack it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def overview(rows: list[Row], picture: Path) -> None:
    """Draw each figure that has a target as a share of the target: right of the line is better."""
    shown = [(row, share) for row in rows if (share := reached(row)) is not None]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(shown) + 1.2), dpi=110)
    for place, (row, share) in enumerate(reversed(shown)):
        axes.barh(place, share, color=GREEN if row.met else ORANGE, height=0.6)
        axes.text(share + 0.03, place, f"{row.value:.2f}", va="center", color=INK, fontsize=8)
    labels = [f"{row.name}  {row.what}" for row, _ in reversed(shown)]
    axes.set_yticks(range(len(shown)), [label if len(label) < 78 else f"{label[:76]}…" for label in labels])
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel("share of the target reached (the figure itself beside the bar)", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def reached(row: Row) -> float | None:
    """How much of its target a figure reaches: 1 is met, more is better; None without such a target."""
    kind, _, rest = row.target.partition(" ")
    number = rest.partition(" ")[0]
    if row.value is None or kind not in ("≤", "≥") or not number.replace(".", "", 1).isdigit():
        return None
    bound = float(number)
    return bound / row.value if kind == "≤" else row.value / bound


def learning_curves(found: dict[str, list[list[tuple[float, float]]]], picture: Path) -> None:
    """Draw held-out bits per byte by minutes: a thin line per seed and a thick one for their mean."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    for arm, curves in found.items():
        minutes = [seconds / 60 for seconds, _ in curves[0]]
        values = np.array([[bits for _, bits in curve] for curve in curves])
        axes.plot(minutes, values.T, color=COLORS[arm], alpha=0.3, linewidth=0.8)
        axes.plot(minutes, values.mean(0), color=COLORS[arm], linewidth=2, label=NAMES[arm], marker="o", ms=3)
    axes.set_xlabel("minutes of training on one core", color=INK)
    axes.set_ylabel("held-out bits per byte", color=INK)
    axes.set_title(f"The same weights, batches and evaluator, {len(curves)} seeds", loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
