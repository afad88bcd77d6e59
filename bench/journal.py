"""P7, second half: the cost of the journal and of the queue stays constant over many steps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import maskwire
from bench.harness import Row, in_flight_steps, module, process

TINY = np.zeros((1, 16), dtype=np.uint8)


def measure(quick: bool) -> list[Row]:
    """Steps per second in the last tenth of a run, compared with the first."""
    total = 5_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        with (
            process(*module("null_server", room / "run"), log=room / "log") as target,
            maskwire.connect(target, window=8) as trainer,
        ):
            in_flight_steps(trainer, TINY, 200)
            speeds = [in_flight_steps(trainer, TINY, total // 10) for _ in range(10)]
        size = sum(path.stat().st_size for path in (room / "run").glob("journal*"))
    value = speeds[-1] / speeds[0]
    parts = {"steps/s first": speeds[0], "steps/s last": speeds[-1], "journal bytes a step": size / total}
    what = f"steps per second after {total:,} steps ÷ at the start, a trainer that computes nothing"
    low, high = min(speeds) / speeds[0], max(speeds) / speeds[0]
    return [Row("P7", what, "≥ 0.9 (flat)", value, low, high, value >= 0.9, parts=parts)]
