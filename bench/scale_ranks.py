"""Groups of 1, 2 and 4 processes that train one model, and take turns: what bench.scale measures.

python -m bench.scale_ranks RANK SIZE STORE     one process of a group; it reads what to do from stdin
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.harness import cores, module
from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.training.sharding import ManyRanks
from maskwire_server.training.trainer import TorchTrainer

MODEL = {
    "num_tokens": 257,
    "mask_id": 256,
    "max_seq_len": 64,
    "dim": 128,
    "depth": 4,
    "heads": 4,
    "dim_head": 32,
}
COLUMNS, BUDGET = 64, 1024
ROWS = (8, 16, 32, 48)
SIZES = (1, 2, 4)
BYTES = (4_096, 800_000)
NUMBER = 4
"""Bytes of a number."""


@dataclass
class Measured:
    """The minimum of each measurement, by (ranks, rows) and by (ranks, bytes).

    Busy seconds are the CPU seconds of all ranks, divided by the cores that they can use: what a call takes
    where no other process runs and no core waits. Other processes lengthen the wall-clock time far more.
    """

    shape: tuple[int, int, int]
    """The numbers of weights: of a block, how many blocks, and outside of them."""
    steps: dict[tuple[int, int], float] = field(default_factory=dict)
    """Busy seconds."""
    walls: dict[tuple[int, int], float] = field(default_factory=dict)
    """Wall-clock seconds of the same steps."""
    gathers: dict[tuple[int, int], float] = field(default_factory=dict)
    scatters: dict[tuple[int, int], float] = field(default_factory=dict)


def measure(seconds: float) -> Measured:
    """Start a group of processes of each size, and let the groups work in turn until the time is up."""
    found = Measured((0, 0, 0))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = {size: stack.enter_context(group(size, Path(folder))) for size in SIZES}
        for ask, rows in itertools.product(groups.values(), ROWS):
            ask({"rows": rows, "steps": 2})  # warm
        rounds = 0
        while rounds < 3 or time.monotonic() - began < seconds:
            for size, ask in groups.items():
                busy = 1 / min(size, cores())
                for rows in ROWS:
                    answer = ask({"rows": rows, "steps": 2})
                    found.shape = tuple(answer["shape"])
                    _keep(found.steps, (size, rows), answer["cpu"] * busy)
                    _keep(found.walls, (size, rows), answer["wall"])
                for count in BYTES if size > 1 else ():
                    for kept, name in ((found.gathers, "gather"), (found.scatters, "scatter")):
                        _keep(kept, (size, count), ask({name: count, "calls": 20})["cpu"] * busy)
            rounds += 1
    return found


def _keep(least: dict[tuple[int, int], float], key: tuple[int, int], value: float) -> None:
    least[key] = min(value, least.get(key, math.inf))


@contextmanager
def group(size: int, folder: Path) -> Iterator[Callable[[dict[str, int]], dict[str, Any]]]:
    """Processes that carry out what they are asked to, together. The first of them answers."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    store = folder / f"store-{size}"
    processes = [
        subprocess.Popen(
            module("scale_ranks", rank, size, store),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(size)
    ]  # fmt: skip

    def ask(what: dict[str, int]) -> dict[str, Any]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
        assert processes[0].stdout is not None
        answer: dict[str, Any] = json.loads(processes[0].stdout.readline())
        return answer

    try:
        yield ask
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def work(rank: int, size: int, store: str) -> None:
    """One process of a group."""
    ranks = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        ranks = ManyRanks(torch.device("cpu"))
    trainer = TorchTrainer(
        ModelConfig(**MODEL),
        ObjectiveConfig(),
        OptimizerConfig(),
        ServeConfig(device="cpu", threads=1, micro_batch_tokens=BUDGET),
        0,
        ranks,
    )
    trainer.begin()
    weights = sum(each.numel() for each in trainer.networks.generator.parameters())
    block = sum(each.numel() for each in trainer.networks.generator.blocks[0].parameters())
    blocks = len(trainer.networks.generator.blocks)
    shape = (block, blocks, weights - block * blocks)
    step = 0

    def best(call: Callable[[], object], count: int, *, together: int = 1) -> dict[str, float]:
        """The least wall-clock seconds of a call, and the least CPU seconds of all ranks.

        The CPU clock is too coarse for one call: it is read before and after `together` calls.
        """
        walls, cpus = [], []
        for _ in range(count // together):
            if size > 1:
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(together):
                call()
            walls.append((time.perf_counter() - wall) / together)
            used = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
            if size > 1:
                dist.all_reduce(used)
            cpus.append(float(used) / together)
        return {"wall": min(walls), "cpu": min(cpus)}

    def train(rows: int) -> None:
        nonlocal step
        step += 1
        ids = np.random.default_rng(step).integers(0, 256, (rows, COLUMNS))
        trainer.train_step(1, step, Batch(ids, rows, COLUMNS), Modes())

    answer: dict[str, Any]
    for line in sys.stdin:
        asked = json.loads(line)
        if "rows" in asked:
            answer = best(partial(train, asked["rows"]), asked["steps"]) | {"shape": shape}
        else:
            count = asked.get("gather") or asked["scatter"]
            whole = torch.zeros(count // NUMBER // size * size)
            own = torch.zeros(len(whole) // size)
            call = partial(dist.reduce_scatter_single, own, whole)
            if "gather" in asked:
                call = partial(dist.all_gather_single, whole, own)
            answer = best(call, asked["calls"], together=min(10, asked["calls"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
