"""P9: the pause that a checkpoint causes, compared with one copy of the state; the cost of saving often."""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import maskwire
from bench.harness import Row, in_turn, process, ratio

MODEL = ("model.dim=512", "model.depth=4", "model.heads=8", "model.max_seq_len=128")
SERVER = str(Path(sys.executable).with_name("maskwire-server"))
EVERY_SECONDS = 10.0


def measure(quick: bool) -> list[Row]:
    """The rows of P9."""
    ids = np.random.default_rng(0).integers(0, 256, (4, 128))
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"--set={setting}"
            for setting in (*MODEL, "serve.address=127.0.0.1:0", "checkpoints.every_seconds=1e6")
        ]
        command = [SERVER, "serve", f"--run-dir={folder}/run", *settings]
        with (
            process(*command, log=Path(folder) / "log") as target,
            maskwire.connect(target, window=4) as trainer,
            maskwire.attach(target) as other,
        ):
            size = trainer.checkpoint("warm").size_bytes
            state = state_of(Path(folder) / "run" / "checkpoints" / "warm")
            room = [tensor.clone() for tensor in state]
            pauses, copies = [], []
            for number in range(3 if quick else 15):
                pauses.append(pause(trainer, other, ids, f"pause-{number}"))
                copies.append(copy(state, room))
            seconds = 12.0 if quick else 20.0
            saving, calm = in_turn(
                1 if quick else 3,
                lambda: training(trainer, ids, seconds, other),
                lambda: training(trainer, ids, seconds, None),
            )
    parts = {
        "state MB": size / 1e6, "pause ms": statistics.median(pauses) * 1e3,
        "copy ms": statistics.median(copies) * 1e3,
    }  # fmt: skip
    what = "the pause between two steps that a checkpoint causes ÷ one copy of the state"
    often = f"steps per second, a checkpoint every {EVERY_SECONDS:.0f} s ÷ without"
    return [
        ratio(Row("P9", what, "≤ 1.5", None, parts=parts), pauses, copies, at_most=1.5),
        ratio(Row("P9", often, "≥ 0.97", None), saving, calm, at_least=0.97),
    ]


def pause(trainer: maskwire.Trainer, other: maskwire.Client, ids: Any, name: str) -> float:
    """Seconds that one save keeps the device idle, beyond the usual wait between steps."""
    waits: list[tuple[float, float]] = []
    saving = threading.Thread(target=other.checkpoint, args=(name,))
    waiting: deque[Any] = deque()
    last = time.perf_counter()
    for number in range(24):
        waiting.append(trainer.submit(ids))
        if number == 12:
            saving.start()
        if len(waiting) == 4:
            answer = waiting.popleft().result()
            now = time.perf_counter()
            waits.append((now - last - answer.metrics.compute_seconds, now - last))
            last = now
    for future in waiting:
        future.result()
    saving.join()
    usual = statistics.median(wait for wait, _ in waits[2:10])
    return max(wait for wait, _ in waits[8:]) - usual


def state_of(checkpoint: Path) -> list[torch.Tensor]:
    """Copies of the tensors in a checkpoint."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return [tensor.clone() for file in files for tensor in load_file(file).values()]


def copy(state: list[torch.Tensor], room: list[torch.Tensor]) -> float:
    """Seconds to copy the state into memory that was written before, while nothing else runs."""
    began = time.perf_counter()
    for into, tensor in zip(room, state, strict=True):
        into.copy_(tensor)
    return time.perf_counter() - began


def training(trainer: maskwire.Trainer, ids: Any, seconds: float, saver: maskwire.Client | None) -> float:
    """Steps per second over `seconds`, with regular saves if there is a `saver`."""
    stop = threading.Event()

    def save() -> None:
        while saver is not None and not stop.wait(EVERY_SECONDS / 2):
            saver.checkpoint()
            stop.wait(EVERY_SECONDS / 2)

    saving = threading.Thread(target=save)
    saving.start()
    waiting: deque[Any] = deque()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        waiting.append(trainer.submit(ids))
        if len(waiting) == 4:
            waiting.popleft().result()
            count += 1
    for future in waiting:
        future.result()
        count += 1
    took = time.perf_counter() - began
    stop.set()
    saving.join()
    return count / took
