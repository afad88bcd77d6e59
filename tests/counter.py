"""A trainer without torch: its state is a running hash of what it trained on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskwire.v1.values import Losses, ModelInfo, Outcome, RowResult
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.errors import Unwanted
from maskwire_server.results import EvalOptions, EvalResult, GenerateOptions, GenerationState, StepResult

NAN_ID = 7
"""A batch that begins with this id is not finite."""
FAIL_ID = 8
"""A batch that begins with this id raises before the update."""
HANG_ID = 250
"""A batch that begins with this id never ends."""
KILL_ID = 9
"""A batch that begins with this id kills the process."""


class CounterSnapshot:
    def __init__(self, state: dict[str, object]) -> None:
        self._state = state

    def write(self, folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps(self._state))


class CounterTrainer:
    """The trainer that the engine's tests use; `gate` lets a test hold it in the middle of a step."""

    threads = 1
    read_tokens = 2**26

    def __init__(self) -> None:
        self.state = hashlib.sha256(b"start").hexdigest()
        self.trained: list[tuple[int, int]] = []
        self.prepared: list[tuple[int, int, Batch, Modes]] = []
        self.passes = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(257, 256, None, 512, 1, "counting", True, False)

    @property
    def versions(self) -> dict[str, str]:
        return {"device": "counter", "threads": str(self.threads)}

    def begin(self) -> str:
        return ""

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        pass

    def use_threads(self, count: int) -> None:
        self.threads = count

    def usable_after(self, error: BaseException) -> bool:
        return True

    def warm_up(self) -> None:
        pass

    def prepare_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> None:
        self.prepared.append((lineage, step, batch, modes))

    def train_step(
        self, lineage: int, step: int, batch: Batch, modes: Modes, meanwhile: Callable[[], None] | None = None
    ) -> StepResult:
        self.entered.release()
        self.gate.wait(60)
        if meanwhile is not None:
            meanwhile()
        first = int(batch.ids.flat[0])
        if first == FAIL_ID:
            raise RuntimeError("the secret of the failing batch")
        if first == HANG_ID:
            threading.Event().wait()
        if first == KILL_ID:
            os.kill(os.getpid(), signal.SIGKILL)
        if first == NAN_ID:
            return StepResult(Outcome.SKIPPED_NON_FINITE, Losses(float("nan"), float("nan")))
        text = f"{self.state} {lineage} {step} {batch.ids.astype(np.int64).tobytes().hex()} {modes}"
        self.state = hashlib.sha256(text.encode()).hexdigest()
        self.trained.append((lineage, step))
        loss = int(self.state[:12], 16) / 2**48
        return StepResult(Outcome.APPLIED, Losses(loss, loss), 2 * loss, modes.learning_rate or 1e-3, 1, 2)

    def eval_loss(
        self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool] = lambda: True
    ) -> EvalResult:
        loss = int(self.state[:12], 16) / 2**48
        rows = tuple(RowResult(row, loss, batch.columns) for row in options.row_ids)
        losses = Losses(loss, loss)
        return EvalResult(
            losses, loss, loss, loss, None, None, 0.5, None, batch.tokens, False, options.draws, rows=rows
        )

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        """From left to right, one position a pass, ids that tell the row's seed; as slow as a step is."""
        ids = np.where(prompts.known, prompts.ids, self.info.mask_id)
        masked, passes = prompts.unknown, 0
        while masked.any():
            if not wanted():
                raise Unwanted("cancelled")
            self.entered.release()
            self.gate.wait(60)
            passes += 1
            self.passes += 1
            first = masked & (masked.cumsum(1) == 1)
            rows, columns = first.nonzero()
            ids[rows, columns] = (np.array(options.row_seeds)[rows] + columns) % 256
            masked = masked & ~first
            left = tuple(masked.sum(1).tolist())
            yield GenerationState(np.where(prompts.valid, ids, 0).astype(np.uint16), left, passes)

    def snapshot(self) -> CounterSnapshot:
        return CounterSnapshot({"state": self.state})

    def load(self, folder: Path) -> None:
        self.state = json.loads((folder / "state.json").read_text())["state"]
