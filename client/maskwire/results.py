"""What calls return: frozen values; losses in nats, times in seconds. None means absent, never 0."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt


class _Known(enum.IntEnum):
    """Numbers of the wire; what a newer server sends is UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> _Known | None:  # noqa: ARG003
        return cls(0)


class Outcome(_Known):
    """What became of a consumed step."""

    UNKNOWN = 0
    APPLIED = 1
    SKIPPED_NON_FINITE = 2
    OUT_OF_MEMORY = 3
    POISON = 4


class RunState(_Known):
    """What the run is doing."""

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
    """`loss` is what was minimised."""

    loss: float
    generator_loss: float | None
    critic_loss: float | None


@dataclass(frozen=True)
class StepMetrics:
    """Measured on the way."""

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
    """The recorded answer of an earlier attempt."""
    digest: bytes
    metrics: StepMetrics

    @property
    def loss(self) -> float:
        """What was minimised."""
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
    """What the server keeps of a consumed step for ever."""

    lineage: int
    step: int
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes


@dataclass(frozen=True)
class StepsPage:
    """Some recorded steps of one lineage, in order, and where the lineage began."""

    run_id: str
    lineage: int
    parent_lineage: int
    """0 for the first lineage."""
    start_step: int
    """The step that the lineage began from; its own steps come behind."""
    checkpoint: str
    """What was restored to begin it; empty for the first."""
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
    """Nats: the first half of the draws less the second, which the error of the draws is made of."""


@dataclass(frozen=True)
class LossSums:
    """What an evaluation's losses are ratios of: over several calls these add up."""

    generator_nats: float
    generator_weight: float
    critic_nats: float | None = None
    critic_weight: float | None = None
    critic_loss_weight: float = 1.0
    """The critic's share of the total loss."""


@dataclass(frozen=True)
class FractionResult:
    """The part of an evaluation with masked fractions in (low, high]."""

    low: float
    high: float
    nats_per_masked_token: float | None
    accuracy: float | None
    masked_tokens: int


@dataclass(frozen=True)
class EvalResult:
    """An evaluation; `nats_per_token` is the negative ELBO whatever the objective.

    By the chain rule it is the negative log-likelihood under the order asked for.
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
    """Sampled rows, finished or on the way."""

    tokens: npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]
    """[rows, columns], or a list of rows that differ in length; the mask id where still masked."""
    unmasking_step: int
    """Counted from 1."""
    done: bool
    still_masked: tuple[int, ...]
    """Positions still masked, one a row."""
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
    """A whole checkpoint."""

    name: str
    lineage: int
    step: int
    digest: bytes
    size_bytes: int
    files: dict[str, FileInfo]
    created: datetime
    labels: dict[str, str]
    score: float | None = None
    """What whoever saved it said it is worth, lower is better."""


@dataclass(frozen=True)
class RestoreResult:
    """Where the run is after a restore."""

    lineage: int
    step: int
    digest: bytes


@dataclass(frozen=True)
class ModelInfo:
    """What is served."""

    num_tokens: int
    mask_id: int
    pad_id: int | None
    max_seq_len: int
    parameters: int
    objective: str
    loss_is_bound: bool
    has_critic: bool
    self_cond: bool = False
    """Each pass of an evaluation or generation takes two."""


@dataclass(frozen=True)
class Limits:
    """The server's bounds on one request."""

    max_batch_tokens: int
    max_message_bytes: int
    window: int
    max_draws: int
    max_generation_steps: int
    max_read_tokens: int = 0
    """Positions that one evaluation or generation may push through the model; 0: the server does not say."""


@dataclass(frozen=True)
class InexactReplay:
    """Steps that a start of the server computed again, close to the recorded results, not the same bytes."""

    lineage: int
    first_step: int
    last_step: int
    accepted: bool
    """An operator accepted it; otherwise it was within the tolerance for rounding."""


@dataclass(frozen=True)
class Status:
    """Is it stuck or working?"""

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
    """What the run's ids stand for: "bytes", or the SHA-256 of a tokenizer's file; empty: not said."""
    limits: Limits
    """The server's bounds on one request."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the data that the run is trained on, in named parts; empty: not said."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step, and of a server of version 0.1."""
