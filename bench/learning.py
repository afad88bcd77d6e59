"""L1 and L3: what a training run learns, compared with the entropy of its data, and with x-transformers.

Not part of `make bench`, because it takes about 100 minutes on two cores: python -m bench --only L1,L3. The
runs of L3 are stored in docs/learning.json, and drawn.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from bench.harness import Row, cores, module
from bench.learner import ARMS
from bench.picture import learning_curves
from bench.sources import flip_chain, pairs
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training.trainer import TorchTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEPT, SECONDS = DOCS / "learning.json", 900
Ids = npt.NDArray[np.int64]


class Run(TypedDict):
    """What `bench.learner` prints."""

    steps: int
    curve: list[tuple[float, float]]
    """Seconds of training, and held-out bits per byte."""


def measure(quick: bool) -> list[Row]:
    """The rows of L1 and L3."""
    return [*known_answers(), *(curves(seeds=1, seconds=20) if quick else curves(seeds=3, seconds=SECONDS))]


def known_answers() -> list[Row]:
    """L1: sources whose entropy is known, and reached by a small model."""
    return [
        known("pairs of equal symbols", partial(pairs, n=LENGTH, symbols=8), math.log(8) / 2, 8),
        known(
            "a chain that flips with probability 0.1", partial(flip_chain, n=LENGTH, flip=FLIP), FLIP_NATS, 2
        ),
    ]


LENGTH, FLIP = 16, 0.1
# The first symbol, and 15 times whether it flips, over 16 positions: nats per symbol.
FLIP_NATS = (math.log(2) - 15 * (FLIP * math.log(FLIP) + (1 - FLIP) * math.log(1 - FLIP))) / LENGTH


def known(what: str, source: Callable[[np.random.Generator, int], Ids], best: float, symbols: int) -> Row:
    """L1 on one source: nats per symbol by the chain rule, which is exact, ÷ the entropy."""
    whole = config.load(
        None,
        model={"num_tokens": symbols + 1, "mask_id": symbols, "max_seq_len": LENGTH, "dim": 64, "depth": 2,
               "heads": 2, "dim_head": 32},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 50, "schedule": "cosine", "total_steps": 1500},
    )  # fmt: skip
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, 0)
    rng = np.random.default_rng(0)
    for step in range(1, 1501):
        trainer.train_step(1, step, Batch(source(rng, 128), 128, LENGTH), Modes())
    ids = source(np.random.default_rng(1), 4096)
    found = trainer.eval_loss(Batch(ids, *ids.shape), EvalOptions(tuple(range(len(ids))), 1, chain_rule=True))
    row = Row("L1", f"nats a symbol ÷ the source's entropy, {what}", "≤ 1.03", found.nats_per_token / best)
    row.parts = {"nats": found.nats_per_token, "entropy": best, "standard error": found.standard_error or 0.0}
    row.met = row.value is not None and row.value <= 1.03
    return row


def curves(seeds: int, seconds: float) -> list[Row]:
    """L3: held-out bits per byte after the same seconds. Arms share weights, batches and evaluator.

    Runs of `SECONDS` are kept in docs/learning.json, so that it resumes where it was stopped.
    """
    if importlib.util.find_spec("x_transformers") is None:
        note = 'not measured: pip install "maskwire[bench]"'
        return [Row("L3", "held-out bits per byte beside x-transformers'", "", None, note=note)]
    found: dict[str, Run] = {}
    if seconds == SECONDS and KEPT.exists():
        found = json.loads(KEPT.read_text())
    names = [f"{arm}, seed {seed}" for seed in range(seeds) for arm in ARMS]
    with ThreadPoolExecutor(cores()) as pool:  # each on one core
        runs = {name: pool.submit(learned, name, seconds) for name in names if name not in found}
        for name, run in runs.items():
            found[name] = run.result()
            print(f"  {name}: {found[name]['curve'][-1][1]:.3f} bits per byte", file=sys.stderr, flush=True)
            if seconds == SECONDS:
                KEPT.write_text(json.dumps(found, indent=0) + "\n")
    at_the_end = {
        arm: [found[f"{arm}, seed {seed}"]["curve"][-1][1] for seed in range(seeds)] for arm in ARMS
    }
    rows = []
    for ours in ("linear", "quadratic"):
        for peer, named in (("peer", "x-transformers', its weight mended"), ("bernoulli", "dLLM's loop")):
            fewer = [b - a for a, b in zip(at_the_end[ours], at_the_end[peer], strict=True)]
            rows.append(difference(f"held-out bits per byte of {named}, − ours, {ours} schedule", fewer))
            for arm in (peer, ours):
                rows[-1].parts[f"{arm}: bits"] = mean(at_the_end[arm])
                rows[-1].parts[f"{arm}: steps"] = mean(
                    found[f"{arm}, seed {n}"]["steps"] for n in range(seeds)
                )
    if seconds == SECONDS:
        drawn = {arm: [found[f"{arm}, seed {seed}"]["curve"] for seed in range(seeds)] for arm in ARMS}
        learning_curves(drawn, DOCS / "images" / "learning-beside-peer.png")
    return rows


def learned(name: str, seconds: float) -> Run:
    """One run, in its own process. `name` is "ARM, seed N"."""
    arm, _, seed = name.partition(", seed ")
    done = subprocess.run(module("learner", arm, seed, seconds), capture_output=True, text=True, check=True)
    run: Run = json.loads(done.stdout)
    return run


def difference(what: str, values: list[float]) -> Row:
    """The mean over seeds, compared with two of its standard errors."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    row = Row("L3", what, "> 2 standard errors", mean(values), min(values), max(values))
    row.met = None if math.isnan(error) else mean(values) > 2 * error
    row.parts = {"standard error": error}
    return row
