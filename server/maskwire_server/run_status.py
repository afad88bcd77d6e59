"""The report of a run's status."""

from __future__ import annotations

from dataclasses import dataclass

from maskwire.v1.values import InexactReplay, MirrorStatus, ModelInfo, RunState
from maskwire_server.results import CheckpointInfo


@dataclass(frozen=True)
class RunStatus:
    """State, progress and what the run is waiting for."""

    state: RunState
    state_since: float
    """Seconds since the epoch."""
    waiting_for: str
    run_id: str
    lineage: int
    step: int
    durable_step: int
    digest: bytes
    queue_length: int
    queue_limit: int
    steps_per_second: float
    tokens_per_second: float
    last_error: str
    writer: str
    epoch: int
    model: ModelInfo | None
    """None until the model is built."""
    newest_checkpoint: CheckpointInfo | None
    versions: dict[str, str]
    tokenizer: str
    data: dict[str, str]
    """The fingerprint of the run's data; empty: not known."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step."""
    mirror: MirrorStatus | None = None
    """None: the run has no mirror."""
