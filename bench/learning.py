"""L1 and L3: what a training run learns, compared with the entropy of its data, and with x-transformers.

Not part of `make bench`, because it takes about 20 minutes: python -m bench --only L1,L3. The curves of L3
are stored in docs/learning.json, and drawn.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt

from bench.harness import Row, cores, module
from bench.picture import learning_curves
from bench.sources import flip_chain, pairs
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training.trainer import TorchTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"
ARMS = ("peer", "linear", "quadratic")
Ids = npt.NDArray[np.int64]
Curve = list[tuple[int, float]]


def measure(quick: bool) -> list[Row]:
    """The rows of L1 and L3."""
    return [*known_answers(), *curves(seeds=1 if quick else 3, steps=60 if quick else 200)]


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


def curves(seeds: int, steps: int) -> list[Row]:
    """L3: held-out bits per byte at ten points; all arms have the same weights, batches and evaluator."""
    if importlib.util.find_spec("x_transformers") is None:
        note = 'not measured: pip install "maskwire[bench]"'
        return [Row("L3", "held-out bits per byte beside x-transformers'", "", None, note=note)]
    runs = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    with ThreadPoolExecutor(cores()) as pool:  # steps are counted, not timed, so runs may share the machine
        done = list(pool.map(lambda run: learned(run[0], run[1], steps), runs))
    found = {arm: [curve for (of, _), curve in zip(runs, done, strict=True) if of == arm] for arm in ARMS}
    rows = []
    for arm in ARMS[1:]:
        fewer = [
            [theirs - ours for (_, theirs), (_, ours) in zip(peer, mine, strict=True)]
            for peer, mine in zip(found["peer"], found[arm], strict=True)
        ]
        named = f"x-transformers' held-out bits per byte, its weight mended, − ours, {arm} schedule"
        rows.append(difference(f"{named}, mean of 10 points", [mean(each) for each in fewer]))
        at_the_end = difference(f"{named}, at the end", [each[-1] for each in fewer])
        if arm == "linear":  # our default, which must be better
            at_the_end.target, at_the_end.met = "> 0", (at_the_end.value or 0) > 0
        rows.append(at_the_end)
    if seeds > 1:
        (DOCS / "learning.json").write_text(json.dumps(found) + "\n")
        learning_curves(found, DOCS / "images" / "learning-beside-peer.png")
    return rows


def learned(arm: str, seed: int, steps: int) -> Curve:
    """One run, in its own process."""
    done = subprocess.run(module("learner", arm, seed, steps), capture_output=True, text=True, check=True)
    curve: Curve = json.loads(done.stdout)
    return curve


def difference(what: str, values: list[float]) -> Row:
    """The mean over seeds, compared with two of its standard errors."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    row = Row("L3", what, "≥ −2 standard errors", mean(values), min(values), max(values))
    row.met = None if math.isnan(error) else mean(values) >= -2 * error
    row.parts = {"standard error": error}
    return row
