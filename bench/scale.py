"""What a step costs on several ranks: a model of it, fitted on 1 and 2 ranks of this machine, checked on 4.

    python -m bench.scale            measures for about 90 seconds, then prints every table of docs/scale.md
    python -m bench.scale --tables   the tables that are computed from a machine's figures, without measuring

The costs of computing are fitted to 1 rank, those of communicating to collectives and steps of 2 ranks.
Nothing is fitted to 4 ranks: these points are predicted. The times are CPU seconds of all ranks divided by
the cores that they can use, which other processes disturb little; wall-clock times are shown beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.harness import cores
from bench.scale_ranks import BUDGET, BYTES, COLUMNS, ROWS, SIZES, Measured, measure
from maskwire_server.config import ObjectiveConfig
from maskwire_server.training.corruption import Masking, StepKey, Vocabulary
from maskwire_server.training.micro_batch_split import split
from maskwire_server.training.tensor_batch import TensorBatch

FP32 = 4
"""Bytes of a number: weights, gradients and moments are exchanged and kept in fp32."""


@dataclass(frozen=True)
class Shape:
    """A model, by its numbers of weights."""

    block: int
    """Of one block."""
    blocks: int
    outside: int
    """Of the embedding, the output layer and the rest."""
    averaged: bool = False
    """Whether the run keeps a moving average."""
    self_conditioning: bool = False

    @property
    def weights(self) -> int:
        """All of them."""
        return self.block * self.blocks + self.outside

    @property
    def units(self) -> int:
        """How many groups of weights are gathered one after another: each block, and the rest."""
        return self.blocks + 1


@dataclass(frozen=True)
class Layout:
    """`replicate` copies of the model, each divided among `shard` ranks."""

    shard: int
    replicate: int = 1
    per_core: float = 1.0
    """Ranks that share one core or device: 1, or more if there are more ranks than cores."""

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.shard * self.replicate


@dataclass(frozen=True)
class Costs:
    """The costs of a machine, in seconds."""

    token: float
    """To compute the gradients at one position of a model."""
    part: float
    """Of each micro-batch, whatever its size."""
    unit: float
    """Of each unit that is gathered and reduced, besides its collectives: copies, and torch's own work."""
    divided: float
    """Of each step on sharded weights: what torch adds to the norm, the update and the release."""
    hop: float
    """A collective of no bytes, for each rank but one."""
    byte: float
    """One byte that a rank sends to the others of its copy."""
    far_byte: float | None = None
    """One byte that a rank sends to other copies; None: the same."""


def state_bytes(shape: Shape, shard: int) -> float:
    """Bytes of state that a rank keeps: weight, gradient, two moments, and the average, of its part."""
    return (4 + shape.averaged) * FP32 * shape.weights / shard


def gathered_bytes(shape: Shape) -> float:
    """Bytes gathered at once: the weights and gradients outside the blocks; two blocks and a gradient.

    `fully_shard` copies the weights to gather them even if a single rank has all of them.
    """
    return FP32 * (2 * shape.outside + 3 * shape.block)


def traffic_bytes(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Bytes that a rank sends for one micro-batch: within its copy of the model, and to the other copies.

    A block's weights are gathered twice and its gradient is scattered once. Those outside are gathered once.
    The rank's part of the gradient is summed over the copies (in a ring: twice its bytes).
    """
    passes = 3 + shape.self_conditioning
    shared = FP32 * (passes * shape.block * shape.blocks + 2 * shape.outside)
    part = 2 * FP32 * shape.weights / layout.shard
    within = shared * (layout.shard - 1) / layout.shard
    return within, part * (layout.replicate - 1) / layout.replicate


def collectives(shape: Shape, layout: Layout) -> int:
    """The collectives of one micro-batch, each counted once per participating rank but one."""
    passes = 3 + shape.self_conditioning
    sharded = (passes * shape.blocks + 2) * (layout.shard - 1)
    return sharded + 2 * shape.units * (layout.replicate - 1)


@dataclass(frozen=True)
class Step:
    """Where the seconds of a step go."""

    parts: int
    compute: float
    communicate: float

    @property
    def seconds(self) -> float:
        """The total if nothing overlaps."""
        return self.compute + self.communicate

    @property
    def overlapped(self) -> float:
        """The total if communication and computation overlap fully."""
        return max(self.compute, self.communicate)


def simulate(shape: Shape, layout: Layout, costs: Costs, lengths: list[int], budget: int) -> Step:
    """A step over rows of these lengths, part by part: all ranks wait for the one with the most positions."""
    bounds = [rank * len(lengths) // layout.ranks for rank in range(layout.ranks + 1)]
    of_ranks = [
        [len(part) * columns for part, columns in split(lengths[start:stop], budget)]
        for start, stop in itertools.pairwise(bounds)
    ]
    within, far = traffic_bytes(shape, layout)
    far_byte = costs.byte if costs.far_byte is None else costs.far_byte
    compute = communicate = 0.0
    parts = max(map(len, of_ranks))
    for positions in itertools.zip_longest(*of_ranks, fillvalue=1):
        compute += max(positions) * costs.token + costs.part
        communicate += collectives(shape, layout) * costs.hop + within * costs.byte + far * far_byte
        communicate += costs.unit * shape.units * (layout.ranks > 1)
    if layout.ranks > 1:  # the leader's order and its size, the sums, the norm, the agreement
        communicate += (layout.ranks - 1) * costs.hop * 5 + costs.divided
    return Step(parts, compute * layout.per_core, communicate * layout.per_core)


# ---- the fit


def fitted(found: Measured) -> Costs:
    """The costs of this machine. Nothing measured on more than 2 ranks is used."""
    small, large = ((2 * found.gathers[2, size] + found.scatters[2, size]) / 3 for size in BYTES)
    byte = (large - small) / ((BYTES[1] - BYTES[0]) / 2)
    token, part = _least_squares(found, 1, Costs(0, 0, 0, 0, 0, 0), ("token", "part"))
    known = Costs(token, part, 0, 0, small, byte)
    unit, divided = _least_squares(found, 2, known, ("unit", "divided"))
    return replace(known, unit=unit, divided=divided)


def _least_squares(found: Measured, ranks: int, known: Costs, wanted: tuple[str, ...]) -> list[float]:
    """Fit the `wanted` costs to the steps measured on `ranks` ranks, by least squares of relative errors."""
    seconds = np.array([found.steps[ranks, rows] for rows in ROWS])

    def computed(costs: Costs) -> np.ndarray:
        return np.array([_step(found, ranks, rows, costs).seconds for rows in ROWS])

    base = computed(known)
    columns = [(computed(replace(known, **{name: 1.0})) - base) / seconds for name in wanted]
    answer = np.linalg.lstsq(np.stack(columns, 1), 1 - base / seconds, rcond=None)[0]
    return [max(0.0, float(each)) for each in answer]


def _step(found: Measured, ranks: int, rows: int, costs: Costs) -> Step:
    layout = Layout(ranks, per_core=max(1.0, ranks / cores()))
    return simulate(Shape(*found.shape), layout, costs, [COLUMNS] * rows, BUDGET)


# ---- the front: what the leader does alone


@dataclass(frozen=True)
class Front:
    """Seconds of the leader's own work, which more ranks do not reduce."""

    hash_byte: float
    commit_byte: float
    draw_token: float


def measure_front() -> Front:
    """Hash a payload, commit it to a database as the journal does, and draw the masks of its batch."""
    torch.set_num_threads(1)
    rows, columns = 256, 512
    payload = np.random.default_rng(0).bytes(2**24)
    ids = torch.randint(0, 256, (rows, columns))
    every = torch.ones_like(ids, dtype=torch.bool)
    batch, everything = TensorBatch(ids, every, ~every), list(range(rows))
    how = (ObjectiveConfig(), Vocabulary(257, 256, None), StepKey(0, 1, 1))

    def draw() -> object:
        masking = Masking.of(batch.maskable_s, *how, [(everything, batch.maskable_rn)])
        return masking.corrupt(everything, *batch.take(everything, columns))

    with tempfile.TemporaryDirectory() as folder, sqlite3.connect(Path(folder) / "journal.sqlite") as base:
        base.isolation_level = None
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("PRAGMA synchronous=FULL")
        base.execute("CREATE TABLE payloads (payload BLOB)")
        commit = least(lambda: base.execute("INSERT INTO payloads VALUES (?)", (payload,)), time.perf_counter)
    return Front(
        least(lambda: hashlib.sha256(payload).digest()) / len(payload),
        commit / len(payload),
        least(draw) / (rows * columns),
    )


def least(act: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of a few calls, by the CPU clock unless another is given."""
    seconds = []
    for _ in range(5):
        began = clock()
        act()
        seconds.append(clock() - began)
    return min(seconds)


def lost(ranks: int, *, days_between: float, restart: float, every: float, pause: float) -> float:
    """The share of time that failures cost: the restart, half an interval computed again, and the saves.

    `days_between` failures of one device; `restart`, `every` and `pause` in seconds.
    """
    between = days_between * 86_400 / ranks
    return (restart + every / 2) / between + pause / every


# ---- the tables of docs/scale.md

DAYS_BETWEEN = 7.9 * 1024 / 24
"""Days between two failures of one GPU: one every 7.9 hours among 1,024."""
LLAMA_1B = Shape(block=60_821_504, blocks=16, outside=262_670_336)
LLAMA_8B = Shape(block=218_112_000, blocks=32, outside=1_050_677_248)
FLOPS, LINK, FAR = 989e12 * 0.4, 300e9, 50e9
"""Of an H100: bf16 operations a second at 40%, bytes a second within a host and between hosts."""


def device_costs(shape: Shape, link: float) -> Costs:
    """Costs of a GPU from its data sheet: computing takes 6 operations per weight and position."""
    return Costs(6 * shape.weights / FLOPS, 0, 0, 0, 20e-6, 1 / link, 1 / FAR)


def tables() -> str:
    """What is computed and not measured."""
    lines = ["| model | shard | state per rank | gathered at once |", "|---|---|---|---|"]
    for name, shape in (("1.2B", LLAMA_1B), ("8B", LLAMA_8B)):
        for shard in (1, 8, 64):
            state, at_once = state_bytes(shape, shard), gathered_bytes(shape)
            lines.append(f"| {name} | {shard} | {state / 2**30:.1f} GiB | {at_once / 2**30:.1f} GiB |")
    lines += [
        "",
        "| 8B on 64 GPUs, replicate x shard | positions per rank | traffic per rank: within a copy, between "
        "| compute | communicate | step, overlapped to not at all | positions/s per GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for replicate, shard, positions in itertools.product((1, 8), (64, 8), (4_096, 16_384, 65_536)):
        if replicate * shard != 64:
            continue
        layout = Layout(shard, replicate)
        costs = device_costs(LLAMA_8B, FAR if shard > 8 else LINK)
        step = simulate(LLAMA_8B, layout, costs, [positions] * 64, positions)
        within, far = traffic_bytes(LLAMA_8B, layout)
        lines.append(
            f"| {replicate} x {shard} | {positions:,} | {within / 1e9:.0f} GB, {far / 1e9:.1f} GB "
            f"| {step.compute:.2f} s | {step.communicate:.2f} s "
            f"| {step.overlapped:.2f} to {step.seconds:.2f} s "
            f"| {positions / step.seconds:,.0f} to {positions / step.overlapped:,.0f} |"
        )
    lines += ["", "| GPUs | a failure every | time lost |", "|---|---|---|"]
    for ranks in (8, 64, 256, 1024):
        share = lost(ranks, days_between=DAYS_BETWEEN, restart=60, every=300, pause=0)
        lines.append(f"| {ranks:,} | {DAYS_BETWEEN * 24 / ranks:,.1f} h | {share:.2%} |")
    return "\n".join(lines)


def front_table(front: Front) -> str:
    """What the leader does alone in a step of 8,192 positions per rank, ids of two bytes."""
    lines = ["| ranks | batch | hash | commit | draws, not divided |", "|---|---|---|---|---|"]
    for ranks in (1, 8, 64, 1024):
        tokens = 8192 * ranks
        bytes_ = 2 * tokens
        lines.append(
            f"| {ranks:,} | {bytes_ / 2**20:.2f} MiB | {1e3 * bytes_ * front.hash_byte:.1f} ms "
            f"| {1e3 * bytes_ * front.commit_byte:.1f} ms | {1e3 * tokens * front.draw_token:.0f} ms |"
        )
    return "\n".join(lines)


def fit_table(found: Measured, costs: Costs) -> str:
    """Measured and computed seconds, and the error of the model."""
    lines = ["| ranks | rows | wall clock | busy | computed | error | |", "|---|---|---|---|---|---|---|"]
    for ranks, rows in itertools.product(SIZES, ROWS):
        busy, wall = found.steps[ranks, rows], found.walls[ranks, rows]
        computed = _step(found, ranks, rows, costs).seconds
        lines.append(
            f"| {ranks} | {rows} | {1e3 * wall:.0f} ms | {1e3 * busy:.0f} ms | {1e3 * computed:.0f} ms "
            f"| {computed / busy - 1:+.0%} | {'predicted' if ranks > 2 else 'fitted'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__)
    parser.add_argument(
        "--tables", action="store_true", help="only what is computed from a machine's figures"
    )
    parser.add_argument("--seconds", type=float, default=75, help="how long to measure")
    options = parser.parse_args()
    if not options.tables:
        front = measure_front()
        found = measure(options.seconds)
        costs = fitted(found)
        print(f"{Shape(*found.shape)} on {cores()} cores, load {os.getloadavg()[0]:.1f}\n{costs}\n{front}\n")
        print(f"{fit_table(found, costs)}\n\n{front_table(front)}\n")
    print(tables())


if __name__ == "__main__":
    main()
