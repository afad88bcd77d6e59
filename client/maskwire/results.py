"""The results of calls, as frozen dataclasses.

Losses are in nats and times in seconds. None means that a value is absent; it never means 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt

# One statement, where the formatter would make twelve.
# isort: off
from maskwire.v1.values import (
    DeviceShare as DeviceShare,
    FractionResult as FractionResult,
    InexactReplay as InexactReplay,
    Limits as Limits,
    Losses as Losses,
    LossSums as LossSums,
    MirrorStatus as MirrorStatus,
    ModelInfo as ModelInfo,
    Outcome as Outcome,
    RestoreResult as RestoreResult,
    RowResult as RowResult,
    RunState as RunState,
    TokenizerDescription as TokenizerDescription,
)
# isort: on


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of a training step: its gradient norm, learning rate, token counts and times."""

    gradient_norm: float | None
    """The gradient's global norm before clipping; None if no update was computed."""
    learning_rate: float
    """The learning rate that the step used."""
    masked_tokens: int
    """The number of masked positions."""
    maskable_tokens: int
    """The number of positions that are neither padding nor prompt."""
    queue_seconds: float
    """The time from the step's admission to the start of its computation."""
    compute_seconds: float
    """The duration of the computation."""
    commit_seconds: float
    """The time from the end of the computation until the step was durable."""


@dataclass(frozen=True)
class StepResult:
    """The result of a training step that the server has processed and recorded durably."""

    step: int
    """The step's number, from 1."""
    losses: Losses
    """The step's losses. They can be NaN or infinite if the update was not applied."""
    outcome: Outcome
    """Whether the update was applied, and if not, why."""
    replayed: bool
    """Whether this answer was recorded for an earlier attempt of the same step."""
    digest: bytes
    """The run's digest after the step, 32 bytes."""
    metrics: StepMetrics
    """Measurements of the step."""

    @property
    def loss(self) -> float:
        """The loss that the step minimised, in nats."""
        return self.losses.loss

    @property
    def generator_loss(self) -> float | None:
        """The generator's masked cross-entropy, in nats; None if it was not computed."""
        return self.losses.generator_loss

    @property
    def critic_loss(self) -> float | None:
        """The critic's binary cross-entropy, in nats; None if it was not computed."""
        return self.losses.critic_loss


@dataclass(frozen=True)
class RecordedStep:
    """The server's permanent record of a training step, whether its update was applied or not."""

    lineage: int
    """The number of the lineage, from 1."""
    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes


@dataclass(frozen=True)
class StepsPage:
    """A page of recorded steps of one lineage, in order, and where the lineage started."""

    run_id: str
    """The run's id."""
    lineage: int
    parent_lineage: int
    """The lineage whose checkpoint was restored to start this one; 0 for the first lineage."""
    start_step: int
    """The step that the lineage started from; its own steps come after it."""
    checkpoint: str
    """The checkpoint that was restored to start the lineage; empty for the first lineage."""
    steps: tuple[RecordedStep, ...]
    """The steps of this page, in order."""
    next_page_token: str
    """The `page_token` of the next page; empty on the last page."""


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    For every objective, `nats_per_token` is the negative ELBO. With the chain rule, it is the negative
    log-likelihood under the requested order.
    """

    losses: Losses
    """The losses that training would report, without augmentation, averaged over the draws."""
    nats_per_token: float
    """The bound on the negative log-likelihood, or its value with the chain rule, per maskable token."""
    bits_per_token: float
    """`nats_per_token` in bits."""
    perplexity: float
    """exp(nats_per_token)."""
    standard_error: float | None
    """The standard error of `nats_per_token` over the population of rows; None for a single row."""
    monte_carlo_error: float | None
    """The error of `nats_per_token` that comes from the draws alone; None for a single draw."""
    accuracy: float
    """The share of masked positions whose most probable token was right."""
    critic_accuracy: float | None
    """The share of maskable positions where the critic's sign was right; None without a critic."""
    by_masked_fraction: tuple[FractionResult, ...]
    """Parts of the evaluation by masked fraction, in ascending order."""
    rows: tuple[RowResult, ...]
    """The sum of each row, in the order of the rows."""
    bits_per_byte: float | None
    """Bits per byte of text; None unless `text_bytes` was given."""
    tokens: int
    """The number of maskable positions."""
    step: int
    """The training step whose weights were evaluated."""
    digest: bytes
    ema_weights: bool
    """Whether the weights were the moving average."""
    draws: int
    """The number of draws per row."""
    sums: LossSums
    """The sums from which `losses` were computed."""

    @property
    def loss(self) -> float:
        """The loss of the configured objective, in nats, as training would report it."""
        return self.losses.loss

    @property
    def generator_loss(self) -> float | None:
        """The generator's masked cross-entropy, in nats; None if it was not computed."""
        return self.losses.generator_loss

    @property
    def critic_loss(self) -> float | None:
        """The critic's binary cross-entropy, in nats; None if it was not computed."""
        return self.losses.critic_loss


@dataclass(frozen=True, eq=False)
class GenerateResult:
    """Sampled rows: the finished rows, or their state after an unmasking pass."""

    tokens: npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]
    """Token ids [rows, columns], or a list of rows if lengths differ; the mask id at masked positions."""
    unmasking_step: int
    """The number of the unmasking pass, from 1."""
    done: bool
    """Whether the rows are finished, so that no further result follows."""
    still_masked: tuple[int, ...]
    """For each row, the number of positions that are still masked."""
    step: int
    """The training step whose weights were sampled."""
    digest: bytes
    ema_weights: bool


@dataclass(frozen=True)
class FileInfo:
    """The size and hash of one file of a checkpoint."""

    size_bytes: int
    """The file's size."""
    sha256: bytes
    """The file's SHA-256, 32 bytes."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The description of a complete checkpoint."""

    name: str
    """The checkpoint's name."""
    lineage: int
    step: int
    """The last step that the checkpoint contains."""
    digest: bytes
    """The run's digest after the checkpoint's step, 32 bytes."""
    size_bytes: int
    """The total size of all files."""
    files: dict[str, FileInfo]
    """The checkpoint's files by name."""
    created: datetime
    """When the checkpoint was saved, in UTC."""
    labels: dict[str, str]
    """Texts that were given when the checkpoint was saved, by name."""
    score: float | None = None
    """The rating given when the checkpoint was saved, where lower is better; None if none was given."""


@dataclass(frozen=True)
class NewestStep:
    """The newest durable step, as a status report describes it."""

    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    learning_rate: float
    """The learning rate that the step used."""


@dataclass(frozen=True)
class RunFigures:
    """What the server has counted since its process started. All empty for a server of version 0.1."""

    newest_step: NewestStep | None = None
    """The newest step that the server's process made durable; None if there is none yet."""
    steps: dict[str, int] = field(default_factory=dict)
    """Durable steps by outcome."""
    tokens: int = 0
    """Maskable and prompt tokens of these steps."""
    queue_seconds: float | None = None
    """Mean time of a step in the queue, over the last minute; None if there was no step."""
    compute_seconds: float | None = None
    """Mean time of a step's computation, over the last minute; None if there was no step."""
    commit_seconds: float | None = None
    """Mean time from the end of a step's computation until it was durable, over the last minute."""
    recovery_seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each phase of the server's start, by the phase's name."""
    events_dropped: dict[str, int] = field(default_factory=dict)
    """The number of telemetry events that each subscriber lost, by the subscriber's name."""
    refused_calls: dict[str, int] = field(default_factory=dict)
    """The number of refused calls by reason."""


@dataclass(frozen=True)
class Status:
    """A status report: the run's state, its progress and what it is waiting for."""

    state: RunState
    """The run's state."""
    state_since: datetime
    """When the state began."""
    waiting_for: str
    """What the run is waiting for, in words; empty if it waits for nothing."""
    run_id: str
    lineage: int
    step: int
    """The last step that was applied."""
    durable_step: int
    """The last durable step."""
    digest: bytes
    """The run's digest after the last durable step, 32 bytes."""
    queue_length: int
    """The number of queued requests."""
    queue_limit: int
    """The most requests that can be queued."""
    steps_per_second: float
    """Steps per second over the last minute."""
    tokens_per_second: float
    """Maskable and prompt tokens per second over the last minute."""
    last_error: str
    """The id of the last unexpected error, to search for in the server's log; empty if there is none."""
    writer: str
    """The name of the client that may train; empty if no session is open."""
    epoch: int
    """The number of the newest session; 0 if there is none yet."""
    model: ModelInfo | None
    """The served model; None if the server has not built it yet."""
    newest_checkpoint: CheckpointInfo | None
    """The newest checkpoint; None if there is none."""
    versions: dict[str, str]
    """The versions of maskwire, torch and Python, and the device, by name."""
    uptime_seconds: float
    """How long the server's process has run."""
    tokenizer: str
    """The tokenizer of the run's ids: "bytes", or the SHA-256 of a tokenizer file; empty if not recorded."""
    limits: Limits
    """The server's limits on one request."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the training data, in named parts; empty if not recorded."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    """Steps that recovery recomputed with results that were close but not equal."""
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step, and for a server of version 0.1."""
    figures: RunFigures = field(default_factory=RunFigures)
    """What the server has counted since its process started."""
    device_share: DeviceShare = field(default_factory=DeviceShare)
    """How the device has been divided between steps and reads."""
    step_timeout_seconds: float = 0.0
    """How long a step may take before the server considers it hung; 0 for an older server."""
    mirror: MirrorStatus | None = None
    """The state of the run's mirror; None if the run has no mirror."""
