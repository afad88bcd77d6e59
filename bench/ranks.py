"""P14: two ranks of one thread compared with one process of two threads, on the same global batch.

python -m bench.ranks RANK SIZE REPLICATE STORE STEPS    one rank of a group; rank 0 prints JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from bench.harness import Row, module, ratio

ROWS, COLUMNS, DIM, DEPTH, HEADS, TOKENS = 16, 512, 512, 6, 8, 257
LAYOUTS = {"replicated, 2 x 1": (2, 0.85), "sharded, 1 x 2": (1, 0.7)}
"""The copies of the model, and the target."""


def measure(quick: bool) -> list[Row]:
    """The rows of P14."""
    rounds, steps = (1, 2) if quick else (5, 5)
    one: list[float] = []
    two: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        one.append(speed(1, 1, steps))
        for name, (replicate, _target) in LAYOUTS.items():
            two[name].append(speed(2, replicate, steps))
    rows = []
    for name, (_, target) in LAYOUTS.items():
        what = f"two ranks of one thread ÷ one process of two threads, {DEPTH} × {DIM}, {ROWS} rows, {name}"
        row = Row("P14", what, f"≥ {target}", None)
        row.parts = {"steps/s, two ranks": median(two[name]), "steps/s, one process": median(one)}
        rows.append(ratio(row, two[name], one, at_least=target))
    return rows


def speed(size: int, replicate: int, steps: int) -> float:
    """Steps per second: the inverse of the median step."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = [str(size), str(replicate), str(Path(folder) / "store"), str(steps)]
        ranks = [
            subprocess.Popen([*module("ranks"), str(rank), *given], stdout=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        said = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank of {size} failed")
    found: float = json.loads(said[0].strip().splitlines()[-1])["steps_per_second"]
    return found


def main() -> None:
    """One rank."""
    rank, size, replicate, store, steps = sys.argv[1:]
    import torch
    import torch.distributed as dist

    from maskwire_server import config
    from maskwire_server.batch import Batch, Modes
    from maskwire_server.training.ranks_interface import Ranks
    from maskwire_server.training.sharding import ManyRanks
    from maskwire_server.training.trainer import TorchTrainer

    ranks: Ranks | None = None
    if int(size) > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
        ranks = ManyRanks(torch.device("cpu"), replicate=int(replicate))
    whole = config.load(
        None,
        model={"dim": DIM, "depth": DEPTH, "heads": HEADS, "max_seq_len": COLUMNS, "num_tokens": TOKENS,
               "mask_id": TOKENS - 1},
        serve={"device": "cpu", "threads": 2 // int(size)},
    )  # fmt: skip
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, 0, ranks)
    ids = np.random.default_rng(0).integers(0, TOKENS - 1, (ROWS, COLUMNS))
    seconds = []
    for step in range(1, int(steps) + 2):
        began = time.perf_counter()
        trainer.train_step(1, step, Batch(ids, ROWS, COLUMNS), Modes())
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"steps_per_second": 1 / median(seconds[1:])}), flush=True)


if __name__ == "__main__":
    main()
