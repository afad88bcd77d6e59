"""What a run of the counter trainer must come to: computed here, without a server, from the batches alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from counter import CounterTrainer

from maskwire.v1.digest import DigestVersion, lineage_digest, step_digest
from maskwire_server.batch import Batch, Modes, Payload


def batch(seed: int, step: int) -> np.ndarray[Any, Any]:
    """The rows of a step: a function of the two numbers. No id below 10: those mean something."""
    return np.random.default_rng((seed, step)).integers(10, 250, (2, 8)).astype(np.uint8)


@dataclass
class Expected:
    """The state after each step of one history."""

    digest: bytes
    lineage: int = 1
    step: int = 0

    def __post_init__(self) -> None:
        self._trainer = CounterTrainer()
        self.losses: dict[int, float] = {}
        self.digests: dict[tuple[int, int], bytes] = {(1, 0): self.digest}
        self.states: dict[int, str] = {0: self._trainer.state}

    def train(self, ids: np.ndarray[Any, Any]) -> None:
        """One more step."""
        self.step += 1
        payload = Payload(Batch(ids.astype(np.int64), *ids.shape), Modes())
        result = self._trainer.train_step(self.lineage, self.step, payload.batch, payload.modes)
        self.losses[self.step] = result.losses.loss
        self.digest = step_digest(
            self.digest,
            self.lineage,
            self.step,
            payload.hash(DigestVersion(2, self._trainer.info.num_tokens)),
            1,
        )
        self.digests[self.lineage, self.step] = self.digest
        self.states[self.step] = self._trainer.state

    def restore(self, step: int) -> None:
        """Back to a step of this history, on a new lineage."""
        past = next(d for (_, s), d in reversed(self.digests.items()) if s == step)
        self.lineage, self.step = self.lineage + 1, step
        self.digest = self.digests[self.lineage, step] = lineage_digest(past, self.lineage)
        self._trainer.state = self.states[step]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the trainer's state and the history's digest."""
        return hashlib.sha256(self._trainer.state.encode() + self.digest).hexdigest()


def fingerprint(checkpoint: Path) -> str:
    """The same of a checkpoint's folder."""
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    digest = bytes.fromhex(json.loads((checkpoint / "manifest.json").read_text())["digest"])
    return hashlib.sha256(state.encode() + digest).hexdigest()
