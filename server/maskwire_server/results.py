"""What the trainer and the engine answer: values that travel between the wings, in nats and seconds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from maskwire_server.holder import Holder


class Outcome(enum.IntEnum):
    """What became of a consumed step; the numbers are `maskwire.v1.StepOutcome`'s."""

    APPLIED = 1
    SKIPPED_NON_FINITE = 2
    OUT_OF_MEMORY = 3
    POISON = 4


@dataclass(frozen=True)
class Losses:
    """None means absent, never 0."""

    loss: float
    generator_loss: float | None = None
    critic_loss: float | None = None


@dataclass(frozen=True)
class StepResult:
    """One computed training step."""

    outcome: Outcome
    losses: Losses
    gradient_norm: float | None = None
    """Before clipping; None when no gradient was computed."""
    learning_rate: float = 0.0
    masked_tokens: int = 0
    maskable_tokens: int = 0


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate a batch."""

    row_ids: tuple[int, ...]
    """One global id a row: it seeds the row's draws."""
    draws: int = 16
    seed: int = 0
    only_train_generator: bool = False
    only_train_critic: bool = False
    generator_sample_temperature: float | None = None
    raw_weights: bool = False
    text_bytes: int | None = None
    chain_rule: bool = False
    """The exact likelihood under an order of the positions, in place of the bound; draws are orders then."""
    random_order: bool = False
    """By the chain rule: random orders, not from left to right."""


@dataclass(frozen=True)
class RowResult:
    """One row's part of an evaluation."""

    row_id: int
    nats: float
    tokens: int
    half_difference: float | None = None
    """Nats: the mean over the first half of the draws less that over the second; None for one draw."""


@dataclass(frozen=True)
class FractionResult:
    """The part of an evaluation with masked fractions in (low, high]."""

    low: float
    high: float
    nats_per_masked_token: float | None
    accuracy: float | None
    masked_tokens: int


@dataclass(frozen=True)
class LossSums:
    """What `losses` are ratios of: over several calls, sums add up where ratios would not."""

    generator_nats: float = 0.0
    generator_weight: float = 0.0
    critic_nats: float | None = None
    critic_weight: float | None = None
    critic_loss_weight: float = 1.0


@dataclass(frozen=True)
class EvalResult:
    """One evaluation; see `EvalLossResponse` in the proto for the meaning of each field."""

    losses: Losses
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float | None
    monte_carlo_error: float | None
    accuracy: float
    critic_accuracy: float | None
    tokens: int
    ema_weights: bool
    draws: int
    bits_per_byte: float | None = None
    by_masked_fraction: tuple[FractionResult, ...] = field(default=())
    rows: tuple[RowResult, ...] = field(default=())
    sums: LossSums = LossSums()


class Order(enum.IntEnum):
    """The order in which positions are revealed; the numbers are `maskwire.v1.GenerationOrder`'s."""

    RANDOM = 1
    CONFIDENCE = 2
    MARGIN = 3
    ENTROPY = 4
    CRITIC = 5


class SelfCondMode(enum.IntEnum):
    """What conditions an unmasking pass; the numbers are `maskwire.v1.SelfCondMode`'s."""

    TWO_PASS = 1
    CARRY = 2


@dataclass(frozen=True)
class GenerateOptions:
    """How to sample rows."""

    row_seeds: tuple[int, ...]
    """One a row."""
    steps: int = 0
    """Unmasking passes; 0: one position a pass."""
    order: Order = Order.RANDOM
    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    choice_temperature: float | None = None
    """Of the noise on the order; None: the preset's."""
    remasking: bool = False
    self_cond_mode: SelfCondMode = SelfCondMode.TWO_PASS
    raw_weights: bool = False


@dataclass(frozen=True, eq=False)
class GenerationState:
    """Rows after an unmasking pass."""

    ids: npt.NDArray[np.integer]
    """[b, n] in the narrowest type: the mask id where still masked, the pad id or 0 under padding."""
    still_masked: tuple[int, ...]
    """Positions still masked, one a row."""
    unmasking_step: int
    """Counted from 1."""
    ema_weights: bool = False

    @property
    def done(self) -> bool:
        """Nothing is masked any more."""
        return not any(self.still_masked)


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
    read_tokens: int = 2**26
    """Positions that one evaluation or generation may push through the model where no setting says."""


class RunState(enum.IntEnum):
    """What the run is doing; the numbers are `maskwire.v1.RunState`'s."""

    RECOVERING = 1
    SERVING = 2
    RESTORING = 3
    HELD = 4
    HALTED = 5
    DRAINING = 6
    RECOVERY_FAILED = 7


@dataclass(frozen=True)
class Limits:
    """Bounds on one request."""

    max_batch_tokens: int
    max_message_bytes: int
    window: int
    max_draws: int
    max_generation_steps: int = 1024
    max_read_tokens: int = 2**26
    """Positions that one evaluation or generation pushes through the model, as `rpc.work` counts them."""


@dataclass(frozen=True)
class InexactReplay:
    """Steps that a start computed again, whose results are close to the recorded ones and not the same bytes.

    The weights behind them, and all that was trained on those, follow from this computation.
    """

    lineage: int
    first_step: int
    last_step: int
    accepted: bool
    """An operator accepted it with --accept-inexact-replay; otherwise it was within the tolerance."""


@dataclass(frozen=True)
class SessionAnswer:
    """The writer's session, and what the server holds."""

    run_id: str
    lineage: int
    epoch: int
    step: int
    durable_step: int
    digest: bytes
    tokenizer: str
    """What the run's ids stand for; empty: nobody said."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the run's data; empty: nobody said."""
    superseded: Holder | None = None
    """Whose session it took over; None: nobody's."""
    evaluated_lineage: int = 0
    evaluated_step: int = 0
    """The last step that a writer said it had evaluated; 0: none."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the digest that the session's steps are hashed with."""


@dataclass(frozen=True)
class StepAnswer:
    """A consumed, durable step."""

    step: int
    result: StepResult
    digest: bytes
    replayed: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass(frozen=True)
class EvalAnswer:
    """An evaluation, with the step and digest it saw."""

    result: EvalResult
    step: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class GenerateAnswer:
    """Rows after an unmasking pass, with the step and digest whose weights were sampled."""

    state: GenerationState
    step: int
    digest: bytes


WEIGHT_FILES = ("model.safetensors", "ema.safetensors")
"""The files of a checkpoint that hold weights: as trained, and their moving average if one is kept."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint."""

    name: str
    lineage: int
    step: int
    digest: bytes
    files: tuple[FileInfo, ...]
    created: float
    """Seconds since the epoch."""
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    """What the state is worth, lower is better; None: nobody said."""

    @property
    def size_bytes(self) -> int:
        """The size of its files together."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Chunk:
    """A part of a checkpoint's file."""

    file: FileInfo
    offset: int
    data: bytes


@dataclass(frozen=True)
class RestoreAnswer:
    """Where the run is after a restore."""

    lineage: int
    step: int
    digest: bytes


@dataclass(frozen=True)
class Status:
    """Is it stuck or working?"""

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
    """The fingerprint of the run's data; empty: nobody said."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step."""
