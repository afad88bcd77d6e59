"""The results of calls: frozen values. Losses are in nats, times in seconds; None means absent, never 0."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt


class _Known(enum.IntEnum):
    """An enum of the wire. Values of a newer server become UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> _Known | None:  # noqa: ARG003
        return cls(0)


class Outcome(_Known):
    """Outcome of a consumed step."""

    UNKNOWN = 0
    APPLIED = 1
    SKIPPED_NON_FINITE = 2
    OUT_OF_MEMORY = 3
    POISON = 4


class RunState(_Known):
    """State of the run."""

    UNKNOWN = 0
    RECOVERING = 1
    SERVING = 2
    RESTORING = 3
    HELD = 4
    HALTED = 5
    DRAINING = 6
    RECOVERY_FAILED = 7


@dataclass(frozen=True)
class Losses:
    """Losses of a step or an evaluation. `loss` is the one that training minimises."""

    loss: float
    generator_loss: float | None
    critic_loss: float | None


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
class RowResult:
    """One row's sum, so that evaluations combine exactly."""

    row_id: int
    nats: float
    tokens: int
    half_difference: float | None = None
    """First half of the draws minus the second half, in nats; it gives the error of the draws."""


@dataclass(frozen=True)
class LossSums:
    """Numerators and denominators of an evaluation's losses, which add up over several calls."""

    generator_nats: float
    generator_weight: float
    critic_nats: float | None = None
    critic_weight: float | None = None
    critic_loss_weight: float = 1.0
    """The critic's share of the total loss."""


@dataclass(frozen=True)
class FractionResult:
    """The part of an evaluation whose masked fraction is in (low, high]."""

    low: float
    high: float
    nats_per_masked_token: float | None
    accuracy: float | None
    masked_tokens: int


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
class RestoreResult:
    """Position of the run after a restore."""

    lineage: int
    step: int
    digest: bytes


@dataclass(frozen=True)
class ModelInfo:
    """The served model."""

    num_tokens: int
    mask_id: int
    pad_id: int | None
    max_seq_len: int
    parameters: int
    objective: str
    loss_is_bound: bool
    has_critic: bool
    self_cond: bool = False
    """Self-conditioning: each pass of an evaluation or generation runs the model twice."""


@dataclass(frozen=True)
class Limits:
    """The server's limits on one request."""

    max_batch_tokens: int
    max_message_bytes: int
    window: int
    max_draws: int
    max_generation_steps: int
    max_read_tokens: int = 0
    """The most positions that one evaluation or generation may compute; 0: the server does not say."""


@dataclass(frozen=True)
class InexactReplay:
    """Steps that recovery recomputed with results that were close to the recorded ones but not equal."""

    lineage: int
    first_step: int
    last_step: int
    accepted: bool
    """An operator accepted the difference; otherwise it was within the tolerance for rounding."""


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
