"""The parameters of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwire_server.config import CheckpointsConfig, ServeConfig, StorageConfig
from maskwire_server.engine.trainer_interface import Trainer
from maskwire_server.journal.object_store import ObjectStore


@dataclass(frozen=True)
class EngineOptions:
    """The parameters of an engine: run directory, factory of the trainer, and settings of this process."""

    factory: Callable[[], Trainer]
    """Builds the trainer, on the executor's thread."""
    run_dir: Path
    seed: int
    canonical: bytes
    """The canonical configuration of model and objective: the history digest begins with it."""
    configuration: dict[str, Any]
    """The complete configuration, as JSON values."""
    serve: ServeConfig
    checkpoints: CheckpointsConfig
    versions: dict[str, str]
    """Names and versions of the software. The trainer adds its own when it is built."""
    pretrained: bool = False
    """Whether the model starts from pretrained weights, which expect the ids of their own tokenizer."""
    accept_inexact_replay: bool = False
    accept_lost_history: int | None = None
    """Continue from this step although acknowledged steps after it are lost."""
    identity: Callable[[str], bytes] | None = None
    """Makes the canonical configuration of a new run whose initial weights do not come from the seed, given
    the SHA-256 of these weights. None if `canonical` is the run's."""
    last_error: str = ""
    """Why earlier processes that served the run ended; empty if this is not known."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    store: ObjectStore | None = None
    """The object store of the mirror that `storage` names; None if the run has no mirror."""
    clock: Callable[[], float] = time.monotonic
