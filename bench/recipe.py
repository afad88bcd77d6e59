"""The contest of recipes: held-out bits per byte after equal seconds of training on the same machine.

python -m bench.recipe [ARM ...] [--seconds 60] [--seeds 3] [--test]

Every arm trains on the standard library's sources, as the demo does, for so many seconds of training:
cheaper steps or a faster machine mean more steps. The arms of a seed run one after another, and nothing
else should run meanwhile. They are chosen on the validation split; --test evaluates on the files that the
demo holds out. The learning rate depends on the share p of the seconds that has passed: it rises over the
first 5% and then falls as half a cosine to 0, except in the arm `before`, the demo as it was. Runs are kept
in docs/recipe.json, and the tables of docs/recipe.md are made of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bench.harness import module
from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training.trainer import TorchTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEPT, PAGE = DOCS / "recipe.json", DOCS / "recipe.md"
BEGIN, END = "<!-- tables of bench/recipe.py -->\n", "<!-- end -->\n"
LENGTH, TEST, VALIDATION = (
    128,
    0.05,
    0.1,
)  # shares of the files; the validation files are those between the two
EVAL_ROWS, EVAL_DRAWS, WARM_UP = 192, 4, 0.05


class Recipe(NamedTuple):
    """What an arm differs in."""

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] = MappingProxyType({})
    objective: Mapping[str, Any] = MappingProxyType({})
    rows: int = 8
    rate: float = 4e-3
    decay: str = "cosine"


ROTARY = {"positions": "rotary"}
NORMS = {"norm": "rmsnorm", "qk_norm": True}
MUON = {"name": "muon"}
QUADRATIC = {"schedule": "quadratic"}
BEFORE = {**ROTARY, "dim": 128, "depth": 3, "heads": 2}
NARROW = {**ROTARY, **NORMS, "dim": 64, "depth": 4, "heads": 2, "dim_head": 32}
WIDE = {**NARROW, "dim": 96, "heads": 3}
BEST, WIDER = Recipe(NARROW, MUON, QUADRATIC, rate=8e-3), Recipe(WIDE, MUON, QUADRATIC)
ARMS = {
    "before": Recipe(BEFORE, rows=32, decay="last fifth"),
    "before, cosine": Recipe(BEFORE, rows=32),
    "best": BEST,
    "best, rate 4e-3": BEST._replace(rate=4e-3),
    "best, rate 16e-3": BEST._replace(rate=16e-3),
    "best, rate 4e-3, 16 rows": BEST._replace(rate=4e-3, rows=16),
    "best, 4 rows": BEST._replace(rows=4),
    "best, AdamW": BEST._replace(optimizer={}),
    "best, AdamW, rate 4e-3": BEST._replace(optimizer={}, rate=4e-3),
    "best, AdamW, rate 2e-3": BEST._replace(optimizer={}, rate=2e-3),
    "best, linear schedule": BEST._replace(objective={}),
    "best, LayerNorm and no qk_norm": BEST._replace(model={**NARROW, "norm": "layernorm", "qk_norm": False}),
    "best, no qk_norm": BEST._replace(model={**NARROW, "qk_norm": False}),
    "best, learned positions": BEST._replace(model={**NARROW, "positions": "learned"}),
    "best, SwiGLU": BEST._replace(model={**NARROW, "feed_forward": "swiglu", "ff_mult": 8 / 3}),
    "best, tied embeddings": BEST._replace(model={**NARROW, "tied_embeddings": True}),
    "best, linear decay": BEST._replace(decay="linear"),
    "best, no average": BEST._replace(optimizer={**MUON, "ema_decay": 0.0}),
    "best, weight decay 0.1": BEST._replace(optimizer={**MUON, "weight_decay": 0.1}),
    "4 x 48": BEST._replace(model={**NARROW, "dim": 48, "dim_head": 24}, rate=4e-3),
    "6 x 64, 16 rows": BEST._replace(model={**NARROW, "depth": 6}, rate=4e-3, rows=16),
    "4 x 96": WIDER,
    "4 x 96, 16 rows": WIDER._replace(rows=16),
    "4 x 96, rate 8e-3": WIDER._replace(rate=8e-3),
    "4 x 96, rate 2e-3": WIDER._replace(rate=2e-3),
    "4 x 96, AdamW": WIDER._replace(optimizer={}),
    "4 x 96, AdamW, rate 8e-3": WIDER._replace(optimizer={}, rate=8e-3),
    "4 x 96, linear schedule": WIDER._replace(objective={}),
    "4 x 96, LayerNorm and no qk_norm": WIDER._replace(model={**WIDE, "norm": "layernorm", "qk_norm": False}),
    "6 x 192, 16 rows": WIDER._replace(
        model={**WIDE, "dim": 192, "depth": 6, "heads": 3, "dim_head": 64}, rows=16
    ),
}


def main() -> int:
    """Measure what is not in docs/recipe.json yet, print it, and rewrite the page's tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.recipe")
    parser.add_argument("arms", nargs="*", metavar="ARM", help="default: all of them")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="evaluate on the test split")
    parser.add_argument("--one", type=int, metavar="SEED", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if unknown := [arm for arm in chosen.arms if arm not in ARMS]:
        parser.error(f"no arm {unknown[0]!r}; the arms are: {'; '.join(ARMS)}")
    if chosen.one is not None:
        print(json.dumps(train(ARMS[chosen.arms[0]], chosen.seconds, chosen.one, test=chosen.test)))
        return 0
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    split = "test" if chosen.test else "validation"
    for seed in range(chosen.seeds):
        for arm in chosen.arms or ARMS:
            name = f"{split}, {chosen.seconds:g} s, seed {seed}: {arm}"
            if name in kept:
                continue
            options = ["--seconds", chosen.seconds, "--one", seed, *(["--test"] if chosen.test else [])]
            done = subprocess.run(
                module("recipe", arm, *options), stdout=subprocess.PIPE, text=True, check=True
            )
            kept[name] = json.loads(done.stdout)
            print(f"{name}: {kept[name]['bits']:.3f} bits per byte, {kept[name]['steps']} steps", flush=True)
            KEPT.write_text(json.dumps(kept, indent=0) + "\n")
            write_tables(kept)
    return 0


def train(recipe: Recipe, seconds: float, seed: int, *, test: bool) -> dict[str, Any]:
    """One run: bits per byte at the end and at each quarter before it, steps, and parameters."""
    whole = config.load(
        None,
        model={"num_tokens": 257, "mask_id": 256, "max_seq_len": LENGTH, **recipe.model},
        objective=dict(recipe.objective),
        optimizer={"ema_decay": 0.99, **recipe.optimizer, "learning_rate": recipe.rate},
        run={"seed": seed},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed)
    training, _ = ByteData(python_sources(), length=LENGTH, batch_size=recipe.rows, seed=seed).split(
        VALIDATION
    )
    rows = held_out(test=test)
    trainer.warm_up()
    points: list[float] = []
    step, spent = 0, 0.0
    while spent < seconds:
        if spent >= seconds * (len(points) + 1) / 4:
            points.append(bits(trainer, rows))
        step += 1
        texts = list(training.batch(step))
        lengths = np.array([len(text) for text in texts], np.int32)
        batch = Batch(np.concatenate(texts), len(texts), int(lengths.max()), lengths)
        began = time.perf_counter()
        trainer.train_step(
            1, step, batch, Modes(learning_rate=recipe.rate * share(recipe.decay, spent / seconds))
        )
        spent += time.perf_counter() - began
    found = bits(trainer, rows)
    return {"bits": found, "points": points, "steps": step, "parameters": trainer.info.parameters}


def held_out(*, test: bool) -> list[np.ndarray]:
    """Rows of files that no arm trains on, spread over the split."""
    _, both = ByteData(python_sources(), length=LENGTH, batch_size=1).split(VALIDATION)
    validation, test_files = both.split(TEST)
    data = test_files if test else validation
    return [row for row in data.spread(2 * EVAL_ROWS) if len(row) == LENGTH][:EVAL_ROWS]


def bits(trainer: TorchTrainer, rows: list[np.ndarray]) -> float:
    """Bits per byte: the bound, the same draws every time."""
    batch = Batch(np.stack(rows), len(rows), LENGTH)
    return trainer.eval_loss(batch, EvalOptions(tuple(range(len(rows))), EVAL_DRAWS)).bits_per_token


def share(decay: str, p: float) -> float:
    """The share of the learning rate after the share p of the seconds."""
    if p < WARM_UP:
        return max(p / WARM_UP, 1e-3)
    left = (1 - p) / (1 - WARM_UP)
    if decay == "last fifth":
        return 1.0 if p < 0.8 else 0.25
    return left if decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def write_tables(kept: dict[str, Any]) -> None:
    """Replace the tables of docs/recipe.md."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, found in kept.items():
        setting, _, arm = name.partition(": ")
        runs.setdefault(setting.partition(", seed")[0], {}).setdefault(arm, []).append(found)
    lines = []
    for setting, arms in runs.items():
        lines += [
            f"### {setting.capitalize()} of training\n",
            "| arm | bits per byte | of `before` | steps | parameters |",
            "|---|---|---|---|---|",
        ]
        before = arms.get("before", [])
        for arm, found in sorted(
            arms.items(), key=lambda each: statistics.mean(run["bits"] for run in each[1])
        ):
            lines.append(_row(arm, found, before))
        lines.append("")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest.partition(END)[2]}")


def _row(arm: str, found: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    """An arm's row. Its ratio is that of each seed, with its standard error when there are several."""
    bits = f"{statistics.mean(run['bits'] for run in found):.3f}"
    ratios = [one["bits"] / other["bits"] for one, other in zip(found, before, strict=False)]
    ratio = f"{statistics.mean(ratios):.3f}" if ratios else ""
    if len(ratios) > 1:
        ratio += f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}"
    if len(found) > 1:
        bits += f" ({len(found)} seeds)"
    steps = round(statistics.mean(run["steps"] for run in found))
    return f"| {arm} | {bits} | {ratio} | {steps} | {found[0]['parameters']:,} |"


if __name__ == "__main__":
    sys.exit(main())
