"""Compare recipes: bits per byte of held-out files after the same number of seconds of training.

python -m bench.recipe [ARM ...] [--seconds 60] [--seeds 3] [--test]

Every arm trains on the standard library's sources, as the demo does. Only training counts as time, so an arm
with cheaper steps makes more of them. Arms run one after another; nothing else should run meanwhile. They
are chosen on the validation split; --test evaluates on the files that the demo holds out. The learning rate
rises over the first 5% of the seconds and then falls as half a cosine to 0, except in the arm `before`, the
demo's former recipe. Results are kept in docs/recipe.json; the tables of docs/recipe.md are made from them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.harness import module
from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training import optimizers
from maskwire_server.training.trainer import TorchTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEPT, PAGE = DOCS / "recipe.json", DOCS / "recipe.md"
BEGIN, END = "<!-- tables of bench/recipe.py -->\n", "<!-- end -->\n"
LENGTH, EVAL_ROWS, EVAL_DRAWS = 128, 192, 4
TEST, HELD_OUT = 0.05, 0.1
"""Shares of the files. The validation files are those that are held out and are not test files."""
SCHEDULE = config.OptimizerConfig(learning_rate=1.0, warmup_steps=500, schedule="cosine", total_steps=10_000)
"""The learning rate as a share of its peak; a step is one ten-thousandth of the seconds."""


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from the defaults, rows of a batch, and peak learning rate."""

    model: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    rows: int = 8
    rate: float = 4e-3
    decay: Literal["cosine", "linear", "last fifth"] = "cosine"
    growth: tuple[int, ...] = (1,)
    """Rows of a batch as multiples of `rows`, each for an equal share of the seconds."""
    scaled_init: bool = False
    """Whether initial weights that add to the residual stream are divided by √(2 · depth), as in GPT-2."""


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
    "best, rate 4e-3": replace(BEST, rate=4e-3),
    "best, rate 16e-3": replace(BEST, rate=16e-3),
    "best, rate 4e-3, 16 rows": replace(BEST, rate=4e-3, rows=16),
    "best, 4 rows": replace(BEST, rows=4),
    "best, AdamW": replace(BEST, optimizer={}),
    "best, AdamW, rate 4e-3": replace(BEST, optimizer={}, rate=4e-3),
    "best, AdamW, rate 2e-3": replace(BEST, optimizer={}, rate=2e-3),
    "best, linear schedule": replace(BEST, objective={}),
    "best, LayerNorm and no qk_norm": replace(BEST, model={**NARROW, "norm": "layernorm", "qk_norm": False}),
    "best, no qk_norm": replace(BEST, model={**NARROW, "qk_norm": False}),
    "best, learned positions": replace(BEST, model={**NARROW, "positions": "learned"}),
    "best, SwiGLU": replace(BEST, model={**NARROW, "feed_forward": "swiglu", "ff_mult": 8 / 3}),
    "best, tied embeddings": replace(BEST, model={**NARROW, "tied_embeddings": True}),
    "best, linear decay": replace(BEST, decay="linear"),
    "best, no average": replace(BEST, optimizer={**MUON, "ema_decay": 0.0}),
    "best, initialisation scaled by depth": replace(BEST, scaled_init=True),
    "best, 4, 8 and 16 rows": replace(BEST, rows=4, growth=(1, 2, 4)),
    "best, 8, 16 and 32 rows": replace(BEST, growth=(1, 2, 4)),
    "best, weight decay 0.1": replace(BEST, optimizer={**MUON, "weight_decay": 0.1}),
    "4 x 48": replace(BEST, model={**NARROW, "dim": 48, "dim_head": 24}, rate=4e-3),
    "6 x 64, 16 rows": replace(BEST, model={**NARROW, "depth": 6}, rate=4e-3, rows=16),
    "4 x 96": WIDER,
    "4 x 96, 16 rows": replace(WIDER, rows=16),
    "4 x 96, rate 8e-3": replace(WIDER, rate=8e-3),
    "4 x 96, rate 2e-3": replace(WIDER, rate=2e-3),
    "4 x 96, AdamW": replace(WIDER, optimizer={}),
    "4 x 96, AdamW, rate 8e-3": replace(WIDER, optimizer={}, rate=8e-3),
    "4 x 96, linear schedule": replace(WIDER, objective={}),
    "4 x 96, LayerNorm and no qk_norm": replace(WIDER, model={**WIDE, "norm": "layernorm", "qk_norm": False}),
    "6 x 128, 16 rows": replace(WIDER, model={**WIDE, "dim": 128, "depth": 6, "heads": 4}, rows=16),
    "6 x 128, 8, 16 and 32 rows": replace(
        WIDER, model={**WIDE, "dim": 128, "depth": 6, "heads": 4}, growth=(1, 2, 4)
    ),
    "6 x 192, 16 rows": replace(
        WIDER, model={**WIDE, "dim": 192, "depth": 6, "heads": 3, "dim_head": 64}, rows=16
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
        objective=recipe.objective,
        optimizer={"ema_decay": 0.99, **recipe.optimizer, "learning_rate": recipe.rate},
        run={"seed": seed},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed)
    training, _ = ByteData(python_sources(), length=LENGTH, batch_size=recipe.rows, seed=seed).split(HELD_OUT)
    spread = held_out(test=test).spread(2 * EVAL_ROWS)
    rows = [row for row in spread if len(row) == LENGTH][:EVAL_ROWS]
    if recipe.scaled_init:
        scale_init(trainer)
    trainer.warm_up()
    points: list[float] = []
    step, read, spent = 0, 0, 0.0
    while spent < seconds:
        if spent >= seconds * (len(points) + 1) / 4:
            points.append(bits(trainer, rows))
        step += 1
        texts: list[np.ndarray] = []
        for _ in range(recipe.growth[int(len(recipe.growth) * spent / seconds)]):
            read += 1
            texts.extend(training.batch(read))
        lengths = np.array([len(text) for text in texts], np.int32)
        batch = Batch(np.concatenate(texts), len(texts), int(lengths.max()), lengths)
        began = time.perf_counter()
        trainer.train_step(
            1, step, batch, Modes(learning_rate=recipe.rate * share(recipe.decay, spent / seconds))
        )
        spent += time.perf_counter() - began
    found = bits(trainer, rows)
    return {"bits": found, "points": points, "steps": step, "parameters": trainer.info.parameters}


def scale_init(trainer: TorchTrainer) -> None:
    """Divide the weights that add to the residual stream by √(2 · depth): the sum of 2 · depth outputs."""
    named = dict(trainer.networks.generator.named_parameters())
    added = [weight for name, weight in named.items() if name.endswith(("to_out.weight", "down.weight"))]
    with torch.no_grad():
        for weight in added:
            weight.div_(math.sqrt(len(added)))


def held_out(*, test: bool) -> ByteData:
    """Files that no arm trains on."""
    _, both = ByteData(python_sources(), length=LENGTH, batch_size=1).split(HELD_OUT)
    validation, test_files = both.split(TEST)
    return test_files if test else validation


def bits(trainer: TorchTrainer, rows: list[np.ndarray]) -> float:
    """Bits per byte: the bound, with the same draws every time."""
    batch = Batch(np.stack(rows), len(rows), LENGTH)
    return trainer.eval_loss(batch, EvalOptions(tuple(range(len(rows))), EVAL_DRAWS)).bits_per_token


def share(decay: str, p: float) -> float:
    """The share of the peak learning rate after the share p of the seconds."""
    step = max(1, int(p * 10_000))
    if step < SCHEDULE.warmup_steps or decay == "cosine":
        return optimizers.learning_rate(SCHEDULE, step)
    if decay == "last fifth":
        return 1.0 if p < 0.8 else 0.25
    return (10_000 - step) / (10_000 - SCHEDULE.warmup_steps)


def write_tables(kept: dict[str, Any]) -> None:
    """Replace the tables of docs/recipe.md."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}  # by split and seconds, arm, seed
    for name, found in kept.items():
        setting, _, arm = name.partition(": ")
        split, _, seed = setting.partition(", seed ")
        runs.setdefault(split, {}).setdefault(arm, {})[seed] = found
    lines = []
    for split, arms in runs.items():
        rows = [_row(arm, found, arms.get("before", {})) for arm, found in arms.items()]
        lines += [
            f"## {split.capitalize()} of training\n",
            "| arm | bits per byte | of `before` | steps | parameters |",
            "|---|---|---|---|---|",
            *(row for _, row in sorted(rows)),
            "",
        ]
    text = "\n".join(lines)
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def _row(arm: str, found: dict[str, Any], before: dict[str, Any]) -> tuple[float, str]:
    """An arm's mean bits per byte and its row. Ratios are of runs with the same seed."""
    mean = statistics.mean(run["bits"] for run in found.values())
    ratios = [run["bits"] / before[seed]["bits"] for seed, run in found.items() if seed in before]
    ratio = f"{statistics.mean(ratios):.3f}" if ratios else ""
    if len(ratios) > 1:
        ratio += f" ± {statistics.stdev(ratios) / math.sqrt(len(ratios)):.3f}"
    seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
    steps = round(statistics.mean(run["steps"] for run in found.values()))
    parameters = next(iter(found.values()))["parameters"]
    return mean, f"| {arm} | {mean:.3f}{seeds} | {ratio} | {steps} | {parameters:,} |"


if __name__ == "__main__":
    sys.exit(main())
