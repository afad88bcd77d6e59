"""The results of calls: frozen values. Losses are in nats, times in seconds; None means absent, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt

# One statement, where the formatter would make twelve.
# isort: off
from maskwire.v1.values import (
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
    """Measurements of a step."""

    gradient_norm: float | None
    """The gradient's global norm before clipping; None: no update was computed."""
    learning_rate: float
    """The learning rate that the step used."""
    masked_tokens: int
    """The number of masked positions."""
    maskable_tokens: int
    """The number of positions that are neither padding nor prompt."""
    queue_seconds: float
    """From admission to the start of the computation."""
    compute_seconds: float
    """Duration of the computation."""
    commit_seconds: float
    """From the computation's end until the step was durable."""


@dataclass(frozen=True)
class StepResult:
    """A consumed, durable step."""

    step: int
    """The step's number, from 1."""
    losses: Losses
    """Not finite exactly when the outcome says so."""
    outcome: Outcome
    """What became of the step."""
    replayed: bool
    """The answer was recorded by an earlier attempt."""
    digest: bytes
    """The run's digest after the step, 32 bytes."""
    metrics: StepMetrics
    """Measurements of the step."""

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
    """0 for the first lineage."""
    start_step: int
    """The step that the lineage started from; its own steps come after it."""
    checkpoint: str
    """The checkpoint that was restored to start it; empty for the first lineage."""
    steps: tuple[RecordedStep, ...]
    """The steps of this page, in order."""
    next_page_token: str
    """Empty on the last page."""


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation. `nats_per_token` is the negative ELBO, whatever the objective.

    With the chain rule it is the negative log-likelihood under the requested order.
    """

    losses: Losses
    """The losses that training would report, without augmentation, averaged over the draws."""
    nats_per_token: float
    """Per maskable token."""
    bits_per_token: float
    """The same in bits."""
    perplexity: float
    """exp(nats_per_token)."""
    standard_error: float | None
    """Of nats_per_token, over the population of rows; None: a single row."""
    monte_carlo_error: float | None
    """Of nats_per_token, from the draws alone; None: a single draw."""
    accuracy: float
    """The share of masked positions whose most probable token was right."""
    critic_accuracy: float | None
    """The share of maskable positions where the critic's sign was right; None: no critic."""
    by_masked_fraction: tuple[FractionResult, ...]
    """Parts of the evaluation by masked fraction, ascending."""
    rows: tuple[RowResult, ...]
    """Each row's sum, in the order of the rows."""
    bits_per_byte: float | None
    """None unless `text_bytes` was given."""
    tokens: int
    """The number of maskable positions."""
    step: int
    """The training step whose weights were evaluated."""
    digest: bytes
    ema_weights: bool
    """Whether the weights were the moving average."""
    draws: int
    """Draws per row."""
    sums: LossSums
    """The sums behind `losses`."""

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
    """The rows are finished; nothing follows."""
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
    """Its size."""
    sha256: bytes
    """Its SHA-256, 32 bytes."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    name: str
    """Its name."""
    lineage: int
    step: int
    """The last step that it contains."""
    digest: bytes
    """The run's digest after that step, 32 bytes."""
    size_bytes: int
    """The size of all files."""
    files: dict[str, FileInfo]
    """Its files by name."""
    created: datetime
    """When it was saved, in UTC."""
    labels: dict[str, str]
    """Texts that were given when it was saved."""
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
    """The learning rate that the step used."""


@dataclass(frozen=True)
class RunFigures:
    """What the server has counted since its process started; all empty for a server of version 0.1."""

    newest_step: NewestStep | None = None
    """The newest step that this process made durable; None: none yet."""
    steps: dict[str, int] = field(default_factory=dict)
    """Durable steps by outcome."""
    tokens: int = 0
    """Maskable and prompt tokens of these steps."""
    queue_seconds: float | None = None
    """Mean time of a step in the queue, over the last minute; None: no step."""
    compute_seconds: float | None = None
    """Mean time of a step's computation, over the last minute."""
    commit_seconds: float | None = None
    """Mean time from a step's computation until it was durable, over the last minute."""
    recovery_seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each phase of the server's start."""
    events_dropped: dict[str, int] = field(default_factory=dict)
    """Events that each subscriber of telemetry lost."""
    refused_calls: dict[str, int] = field(default_factory=dict)
    """Refused calls by reason."""


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
    """Evaluations and generations that were ended because a step or a save had waited for
    `serve.max_read_seconds`."""


@dataclass(frozen=True)
class Status:
    """The run's state, its progress and what it is waiting for."""

    state: RunState
    """The run's state."""
    state_since: datetime
    """When the state began."""
    waiting_for: str
    """What the run is waiting for, in words; empty: nothing."""
    run_id: str
    lineage: int
    step: int
    """The last step that was applied."""
    durable_step: int
    """The last durable step."""
    digest: bytes
    """The digest after the durable step, 32 bytes."""
    queue_length: int
    """Queued requests."""
    queue_limit: int
    """The most queued requests."""
    steps_per_second: float
    """Over the last minute."""
    tokens_per_second: float
    """Maskable and prompt tokens, over the last minute."""
    last_error: str
    """Id of the last unexpected error, which the log explains; empty: none."""
    writer: str
    """Name of the client that may train; empty: no session is open."""
    epoch: int
    """The number of the newest session; 0: none yet."""
    model: ModelInfo | None
    """None: it is not built yet."""
    newest_checkpoint: CheckpointInfo | None
    """None: there is none."""
    versions: dict[str, str]
    """Versions by name: maskwire, torch, python and the device."""
    uptime_seconds: float
    """How long the process has run."""
    tokenizer: str
    """Tokenizer of the run's ids: "bytes", or the SHA-256 of a tokenizer file; empty: not recorded."""
    limits: Limits
    """The server's limits on one request."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the training data, in named parts; empty: not recorded."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    """Steps that recovery recomputed with results that were close but not equal."""
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step, and for a server of version 0.1."""
    figures: RunFigures = field(default_factory=RunFigures)
    """What the server has counted since its process started."""
    device_share: DeviceShare = DeviceShare()
    """How the device has been divided between steps and reads."""
    step_timeout_seconds: float = 0.0
    """How long a step may take before the server counts it as hung; 0: an older server."""
    mirror: MirrorStatus | None = None
    """None: the run has no mirror."""
