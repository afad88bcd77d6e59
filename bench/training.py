"""P1: training through the server compared with the same trainer by itself. P7: how its time grows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

import maskwire
from bench.harness import Row, in_flight_steps, in_turn, module, process, ratio

Ids = npt.NDArray[np.int64]
MODEL = ("model.dim=256", "model.depth=4", "model.heads=4", "model.max_seq_len=512")
SIZES = {"100 ms": (8, 64, 0.98), "10 ms": (1, 32, 0.90)}  # rows, columns, target; on two cores
SERVER = str(Path(sys.executable).with_name("maskwire-server"))


def measure(quick: bool) -> list[Row]:
    """The rows of P1 and P7."""
    return [*served(quick), *growth(quick)]


def alone(steps: int, rows: int, columns: int, *settings: str) -> float:
    """Steps per second without a server."""
    done = subprocess.run(
        module("inprocess", steps, rows, columns, *settings), capture_output=True, text=True, check=True
    )
    rate: float = json.loads(done.stdout)["steps_per_second"]
    return rate


def served(quick: bool) -> list[Row]:
    """The rows of P1."""
    rows_of = []
    for name, (rows, columns, target) in SIZES.items():
        steps = (20 if quick else 60) * (1 if name == "100 ms" else 8)
        ids = np.random.default_rng(0).integers(0, 256, (rows, columns))

        def remote(ids: Ids = ids, steps: int = steps) -> float:
            with tempfile.TemporaryDirectory() as folder:
                settings = [f"--set={setting}" for setting in (*MODEL, "serve.address=127.0.0.1:0")]
                command = [SERVER, "serve", f"--run-dir={folder}/run", *settings]
                with (
                    process(*command, log=Path(folder) / "log") as target,
                    maskwire.connect(target, window=4) as trainer,
                ):
                    in_flight_steps(trainer, ids, 3)
                    return in_flight_steps(trainer, ids, steps)

        def local(ids: Ids = ids, steps: int = steps) -> float:
            return alone(steps, *ids.shape, *MODEL)

        through, by_itself = in_turn(2 if quick else 5, remote, local)
        parts = {"ms a step, alone": 1e3 / median(by_itself), "ms a step, served": 1e3 / median(through)}
        row = Row("P1", f"served ÷ in-process training, durable, steps of about {name}", f"≥ {target}", None,
                  parts=parts)  # fmt: skip
        rows_of.append(ratio(row, through, by_itself, at_least=target))
    return rows_of


GROWTH: dict[str, list[tuple[tuple[int, int], tuple[str, ...]]]] = {
    "batch": [((4 << i, 64), ()) for i in range(4)],
    "length": [((4, 64 << i), ()) for i in range(4)],
    "vocabulary": [((4, 64), (f"model.num_tokens={1025 << i}", "model.mask_id=1024")) for i in range(4)],
    "depth": [((4, 64), (f"model.depth={2 << i}",)) for i in range(4)],
}


def growth(quick: bool) -> list[Row]:
    """P7: how step time grows over three doublings; 8 is linear, but attention is not linear in length."""
    rows = []
    for what, sizes in GROWTH.items():
        chosen = sizes[::3] if quick else sizes
        measures = [partial(milliseconds, quick, *size, settings) for size, settings in chosen]
        found = in_turn(1 if quick else 3, *measures)
        parts = {f"{step} ms": median(values) for step, values in enumerate(found)}
        row = Row("P7", f"step time over three doublings of {what}", "≤ 8 (linear)", None, parts=parts)
        rows.append(ratio(row, found[-1], found[0], at_most=8))
    return rows


def milliseconds(quick: bool, count: int, columns: int, settings: tuple[str, ...]) -> float:
    """Milliseconds of a step, with these settings in place of the same ones in MODEL."""
    changed = {setting.partition("=")[0] for setting in settings}
    base = [setting for setting in MODEL if setting.partition("=")[0] not in changed]
    return 1e3 / alone(6 if quick else 10, count, columns, *base, *settings)
