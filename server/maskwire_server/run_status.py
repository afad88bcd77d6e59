"""The report of a run's status."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskwire.v1.values import DeviceShare, InexactReplay, MirrorStatus, ModelInfo, RunState
from maskwire_server.results import CheckpointInfo
from maskwire_server.run_figures import RunFigures


@dataclass(frozen=True)
class RunStatus:
    """The state and progress of a run, and what the run is waiting for."""

    state: RunState
    state_since: float
    """Seconds since the Unix epoch."""
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
    figures: RunFigures = field(default_factory=RunFigures)
    device_share: DeviceShare = field(default_factory=DeviceShare)
    computing_seconds: float = 0.0
    """How long the current computation has made no progress; 0: nothing is being computed."""
    step_timeout_seconds: float = 0.0
    """How long a step may take before the process counts as hung."""
    mirror: MirrorStatus | None = None
    """None: the run has no mirror."""
