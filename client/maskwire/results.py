"""The results of calls: frozen values. Losses are in nats, times in seconds; None means absent, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt

from maskwire.v1.values import (
    FractionResult as FractionResult,
)
from maskwire.v1.values import (
    InexactReplay as InexactReplay,
)
from maskwire.v1.values import (
    Limits as Limits,
)
from maskwire.v1.values import (
    Losses as Losses,
)
from maskwire.v1.values import (
    LossSums as LossSums,
)
from maskwire.v1.values import (
    MirrorStatus as MirrorStatus,
)
from maskwire.v1.values import (
    ModelInfo as ModelInfo,
)
from maskwire.v1.values import (
    Outcome as Outcome,
)
from maskwire.v1.values import (
    RestoreResult as RestoreResult,
)
from maskwire.v1.values import (
    RowResult as RowResult,
)
from maskwire.v1.values import (
    RunState as RunState,
)
from maskwire.v1.values import (
    TokenizerDescription as TokenizerDescription,
)


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of a step."""

    gradient_norm: float | None
    learning_rate: float
    masked_tokens: int
    maskable_tokens: int
    queue_seconds: float
    compute_seconds: float
    commit_seconds: float


@dataclass(frozen=True)
class StepResult:
    """A consumed, durable step."""

    step: int
    losses: Losses
    outcome: Outcome
    replayed: bool
    """The answer was recorded by an earlier attempt."""
    digest: bytes
    metrics: StepMetrics

    @property
    def loss(self) -> float:
        """The loss that was minimised."""
        return self.losses.loss

    @property
    def generator_loss(self) -> float | None:
        """The generator's masked cross-entropy."""
        return self.losses.generator_loss

    @property
    def critic_loss(self) -> float | None:
        """The critic's binary cross-entropy."""
        return self.losses.critic_loss


@dataclass(frozen=True)
class RecordedStep:
    """The permanent record of a consumed step."""

    lineage: int
    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes


@dataclass(frozen=True)
class StepsPage:
    """A page of recorded steps of one lineage, in order, and where the lineage started."""

    run_id: str
    lineage: int
    parent_lineage: int
    """0 for the first lineage."""
    start_step: int
    """The step that the lineage started from; its own steps come after it."""
    checkpoint: str
    """The checkpoint that was restored to start it; empty for the first lineage."""
    steps: tuple[RecordedStep, ...]
    next_page_token: str
    """Empty on the last page."""


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation. `nats_per_token` is the negative ELBO, whatever the objective.

    With the chain rule it is the negative log-likelihood under the requested order.
    """

    losses: Losses
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float | None
    monte_carlo_error: float | None
    accuracy: float
    critic_accuracy: float | None
    by_masked_fraction: tuple[FractionResult, ...]
    rows: tuple[RowResult, ...]
    bits_per_byte: float | None
    tokens: int
    step: int
    digest: bytes
    ema_weights: bool
    draws: int
    sums: LossSums

    @property
    def loss(self) -> float:
        """The configured objective's loss."""
        return self.losses.loss

    @property
    def generator_loss(self) -> float | None:
        """The generator's masked cross-entropy."""
        return self.losses.generator_loss

    @property
    def critic_loss(self) -> float | None:
        """The critic's binary cross-entropy."""
        return self.losses.critic_loss


@dataclass(frozen=True, eq=False)
class GenerateResult:
    """Sampled rows, finished or after an unmasking pass."""

    tokens: npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]
    """[rows, columns], or a list of rows that differ in length; the mask id where still masked."""
    unmasking_step: int
    """Number of the unmasking pass, from 1."""
    done: bool
    still_masked: tuple[int, ...]
    """Number of positions still masked, one per row."""
    step: int
    """The training step whose weights were sampled."""
    digest: bytes
    ema_weights: bool


@dataclass(frozen=True)
class FileInfo:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    name: str
    lineage: int
    step: int
    digest: bytes
    size_bytes: int
    files: dict[str, FileInfo]
    created: datetime
    labels: dict[str, str]
    score: float | None = None
    """The rating given when it was saved, lower is better."""


@dataclass(frozen=True)
class NewestStep:
    """What status shows of a step."""

    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    learning_rate: float


@dataclass(frozen=True)
class RunFigures:
    """What the server has counted since its process started; all empty of a server of version 0.1."""

    newest_step: NewestStep | None = None
    steps: dict[str, int] = field(default_factory=dict)
    """Durable steps by outcome."""
    tokens: int = 0
    """Maskable and prompt tokens of these steps."""
    queue_seconds: float | None = None
    """Mean of the last minute, of a step's time in the queue; None: no step."""
    compute_seconds: float | None = None
    commit_seconds: float | None = None
    recovery_seconds: dict[str, float] = field(default_factory=dict)
    """By phase of the start."""
    events_dropped: dict[str, int] = field(default_factory=dict)
    """Events that a subscriber of telemetry lost."""
    refused_calls: dict[str, int] = field(default_factory=dict)
    """By reason."""


@dataclass(frozen=True)
class DeviceShare:
    """How the server's device has been divided between training steps and reads since the server started."""

    step_seconds: float = 0.0
    """Seconds spent on training steps."""
    read_seconds: float = 0.0
    """Seconds spent on evaluations and generations."""
    owed_seconds: float = 0.0
    """Seconds that steps get before the next evaluation or generation begins, while a client trains."""
    waiting_reads: int = 0
    """Evaluations and generations that wait for the device."""
    refused_reads: int = 0
    """Evaluations and generations that were refused because too many waited."""
    ended_reads: int = 0
    """Evaluations and generations that were ended because a step had waited for `serve.max_read_seconds`."""


@dataclass(frozen=True)
class Status:
    """The run's state, its progress and what it is waiting for."""

    state: RunState
    state_since: datetime
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
    newest_checkpoint: CheckpointInfo | None
    versions: dict[str, str]
    uptime_seconds: float
    tokenizer: str
    """Tokenizer of the run's ids: "bytes", or the SHA-256 of a tokenizer file; empty: not recorded."""
    limits: Limits
    """The server's limits on one request."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the training data, in named parts; empty: not recorded."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step, and of a server of version 0.1."""
    figures: RunFigures = field(default_factory=RunFigures)
    device_share: DeviceShare = DeviceShare()
    step_timeout_seconds: float = 0.0
    """How long a step may take before the server counts it as hung; 0: an older server."""
    mirror: MirrorStatus | None = None
    """None: the run has no mirror."""
