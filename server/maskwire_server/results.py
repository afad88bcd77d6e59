"""Results of the trainer and answers of the engine. Losses are in nats, times in seconds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from maskwire.v1.values import FractionResult, InexactReplay, Losses, LossSums, Outcome, RowResult
from maskwire_server.session_holder import Holder


@dataclass(frozen=True)
class StepResult:
    """The result of a training step."""

    outcome: Outcome
    losses: Losses
    gradient_norm: float | None = None
    """The norm before clipping; None if no gradient was computed."""
    learning_rate: float = 0.0
    masked_tokens: int = 0
    maskable_tokens: int = 0


@dataclass(frozen=True)
class EvalOptions:
    """The options of an evaluation."""

    row_ids: tuple[int, ...]
    """One global id per row, which seeds the row's draws."""
    draws: int = 16
    seed: int = 0
    only_train_generator: bool = False
    only_train_critic: bool = False
    generator_sample_temperature: float | None = None
    raw_weights: bool = False
    text_bytes: int | None = None
    chain_rule: bool = False
    """Compute the exact likelihood in an order of the positions, not the bound; `draws` counts orders."""
    random_order: bool = False
    """With `chain_rule`: random orders, not left to right."""


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation; `EvalLossResponse` in the proto describes each field."""

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
    sums: LossSums = field(default_factory=LossSums)


class Order(enum.IntEnum):
    """The order in which positions are revealed, numbered as in `maskwire.v1.GenerationOrder`."""

    RANDOM = 1
    CONFIDENCE = 2
    MARGIN = 3
    ENTROPY = 4
    CRITIC = 5


class SelfCondMode(enum.IntEnum):
    """How an unmasking pass is self-conditioned, numbered as in `maskwire.v1.SelfCondMode`."""

    TWO_PASS = 1
    CARRY = 2


@dataclass(frozen=True)
class GenerateOptions:
    """The options of a generation."""

    row_seeds: tuple[int, ...]
    """One seed per row."""
    steps: int = 0
    """The number of unmasking passes; 0: one position per pass."""
    order: Order = Order.RANDOM
    temperature: float = 1.0
    """The temperature of each pass, unless there is a start_temperature."""
    start_temperature: float | None = None
    """The temperature at the start, which falls to 0 over the passes; None: it is constant."""
    top_k: int = 0
    """The number of most probable ids to sample from; 0: no limit."""
    top_p: float = 1.0
    choice_temperature: float | None = None
    """The temperature of the noise on the order; None: the default of the order."""
    remasking: bool = False
    self_cond_mode: SelfCondMode = SelfCondMode.TWO_PASS
    raw_weights: bool = False


@dataclass(frozen=True, eq=False)
class GenerationState:
    """The rows of a generation after an unmasking pass."""

    ids: npt.NDArray[np.integer]
    """Shape [b, n], in the narrowest type. The mask id where still masked, the pad id or 0 at padding."""
    still_masked: tuple[int, ...]
    """The number of positions still masked, per row."""
    unmasking_step: int
    """The number of the pass, counted from 1."""
    ema_weights: bool = False

    @property
    def done(self) -> bool:
        """Whether all positions are unmasked."""
        return not any(self.still_masked)


@dataclass(frozen=True)
class SessionAnswer:
    """The answer to OpenSession: the new session and the state of the run."""

    run_id: str
    lineage: int
    epoch: int
    step: int
    durable_step: int
    digest: bytes
    tokenizer: str
    """The tokenizer of the run's ids; empty: not known."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the run's data; empty: not known."""
    superseded: Holder | None = None
    """The holder of the session that was taken over, if any."""
    evaluated_lineage: int = 0
    evaluated_step: int = 0
    """The last step that a writer reported as evaluated; 0: none."""
    inexact_replays: tuple[InexactReplay, ...] = ()
    digest_version: int = 0
    """The version of the digest that the session's steps are hashed with."""


@dataclass(frozen=True)
class StepAnswer:
    """The answer to TrainStep, which is sent when the step is durable, whatever its outcome."""

    step: int
    result: StepResult
    digest: bytes
    replayed: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass(frozen=True)
class EvalAnswer:
    """The answer to EvalLoss: the result, with the step and digest of the evaluated weights."""

    result: EvalResult
    step: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class GenerateAnswer:
    """An answer to Generate: rows after an unmasking pass, with the step and digest of the weights used."""

    state: GenerationState
    step: int
    digest: bytes


FROZEN_FILE = "frozen.safetensors"
"""The file of weights that are never trained. It is the same in all checkpoints of a run and stored once."""
WEIGHT_FILES = ("model.safetensors", "ema.safetensors")
"""The weight files of a checkpoint: as trained, and their moving average if there is one."""


@dataclass(frozen=True)
class FileInfo:
    """The name, size and SHA-256 of a file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class CheckpointInfo:
    """The description of a complete checkpoint."""

    name: str
    lineage: int
    step: int
    digest: bytes
    files: tuple[FileInfo, ...]
    created: float
    """Seconds since the Unix epoch."""
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    """The client's score, of which lower is better; None: not given."""

    @property
    def size_bytes(self) -> int:
        """The total size of the checkpoint's files, in bytes."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Chunk:
    """A part of a checkpoint's file, as a download sends it."""

    file: FileInfo
    offset: int
    data: bytes
