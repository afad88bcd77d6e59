"""The trainer interface that recovery needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from maskwire_server.batch import Batch, Modes
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.results import StepResult


class ReplayTrainer(Protocol):
    """A trainer that loads a checkpoint and computes recorded steps again."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions and settings that results depend on, apart from the configuration."""

    def begin(self) -> str:
        """Load the initial weights. Returns their SHA-256, or "" if they are generated from the seed."""

    def use_threads(self, count: int) -> None:
        """Compute with `count` CPU threads from now on."""

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Use another [optimizer] section and numerics version. Raises ValueError if it cannot use them."""

    def load(self, folder: Path) -> None:
        """Load the state of a checkpoint. Raises ValueError if it does not fit the configuration."""

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Compute one training step and update the weights."""

    def snapshot(self) -> Snapshot:
        """Return a copy of the state in host memory."""
