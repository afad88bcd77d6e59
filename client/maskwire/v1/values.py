"""Values that server and client share. Losses are in nats. An absent value is None, not 0."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from dataclasses import dataclass


class _Known(enum.IntEnum):
    """An enum of the protocol. A value that only newer versions have becomes UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> _Known | None:  # noqa: ARG003
        return cls(0)


class Outcome(_Known):
    """The outcome of a step: whether its update was applied and, if not, why."""

    UNKNOWN = 0
    """An outcome that only newer versions have."""
    APPLIED = 1
    """The update was applied."""
    SKIPPED_NON_FINITE = 2
    """A loss or the gradient was not finite: the step counts, the weights did not change."""
    OUT_OF_MEMORY = 3
    """The device ran out of memory before the update: the step counts, the weights did not change."""
    POISON = 4
    """The batch crashed the server several times and is quarantined: the step counts, the weights did not
    change."""


class RunState(_Known):
    """The state of a run, as the server's status reports it."""

    UNKNOWN = 0
    """A state that only newer versions have."""
    RECOVERING = 1
    """The server loads a checkpoint and replays the journal."""
    SERVING = 2
    """Steps are admitted."""
    RESTORING = 3
    """A checkpoint is being restored."""
    HELD = 4
    """A disk is full, or a mirror cannot be written: nothing is lost, and no step is admitted."""
    HALTED = 5
    """Three steps in a row were not finite: connect with takeover=True to continue."""
    DRAINING = 6
    """The process is shutting down."""
    RECOVERY_FAILED = 7
    """Recovery stopped; `last_error` says why."""


@dataclass(frozen=True)
class TokenizerDescription:
    """A tokenizer, and the special ids with which its documents begin and end.

    A run keeps the description of the tokenizer of its training data.
    """

    name: str
    """"bytes", or "sha256:" followed by the hash of the tokenizer's file."""
    file: bytes = b""
    """The content of the tokenizer's file (tokenizer.json); empty for the tokenizer "bytes"."""
    document_start: tuple[int, ...] = ()
    """The special ids that each document begins with, such as BOS."""
    document_end: tuple[int, ...] = ()
    """The special ids that each document ends with, such as EOS."""

    @property
    def digest(self) -> str:
        """The SHA-256 of this description, in hexadecimal. A client compares it with the run's."""
        parts = [self.name, list(self.document_start), list(self.document_end)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Losses:
    """Losses of a step or an evaluation. `loss` is the one that training minimises."""

    loss: float
    """What training minimises."""
    generator_loss: float | None = None
    """The generator's masked cross-entropy; None if only the critic was trained."""
    critic_loss: float | None = None
    """The critic's binary cross-entropy; None if there is no critic or only the generator was trained."""


@dataclass(frozen=True)
class RowResult:
    """The loss of one row of an evaluation, as a sum, so that several evaluations can be combined exactly."""

    row_id: int
    """The row's id."""
    nats: float
    """The row's negative ELBO or, with the chain rule, its negative log-likelihood, in nats."""
    tokens: int
    """The number of the row's maskable positions."""
    half_difference: float | None = None
    """The scaled difference between the means over the first and the second half of the draws, in nats. It
    gives the Monte Carlo error. None for a single draw."""


@dataclass(frozen=True)
class LossSums:
    """Numerators and denominators of an evaluation's losses. Add them up to combine several calls."""

    generator_nats: float = 0.0
    """The numerator of the generator's loss: the loss times `generator_weight`."""
    generator_weight: float = 0.0
    """The denominator of the generator's loss."""
    critic_nats: float | None = None
    """The numerator of the critic's loss: the loss times `critic_weight`; None if there is no critic."""
    critic_weight: float | None = None
    """The denominator of the critic's loss; None if there is no critic."""
    critic_loss_weight: float = 1.0
    """The factor of the critic's loss in the total loss."""


@dataclass(frozen=True)
class FractionResult:
    """The part of an evaluation in which the masked fraction is above `low` and at most `high`."""

    low: float
    """The lower end, exclusive."""
    high: float
    """The upper end, inclusive."""
    nats_per_masked_token: float | None
    """The mean cross-entropy of the masked positions, in nats; None if nothing was masked."""
    accuracy: float | None
    """The share of masked positions whose most probable token was right; None if nothing was masked."""
    masked_tokens: int
    """The number of masked positions."""


@dataclass(frozen=True)
class ModelInfo:
    """Properties of the model that the server trains and serves."""

    num_tokens: int
    """The size of the vocabulary, including the mask id."""
    mask_id: int
    """The id at masked positions. Data that contains it is refused."""
    pad_id: int | None
    """The id that marks padding; None if the model has none."""
    max_seq_len: int
    """The longest row that the model takes, in tokens."""
    parameters: int
    """The number of trainable parameters."""
    objective: str
    """The objective, in words: preset, schedule, masking and weighting."""
    loss_is_bound: bool
    """Whether the generator's loss estimates an upper bound on the negative log-likelihood."""
    has_critic: bool
    """Whether the model has a critic."""
    self_cond: bool = False
    """Whether the model uses self-conditioning: each pass of an evaluation or generation runs it twice."""


@dataclass(frozen=True)
class Limits:
    """The server's limits on one request."""

    max_batch_tokens: int
    """The most positions (rows times columns) in one batch."""
    max_message_bytes: int
    """The size of the largest message, in bytes."""
    window: int
    """The most steps in flight in a session."""
    max_draws: int
    """The most evaluation draws per row."""
    max_generation_steps: int = 1024
    """The most unmasking passes per row."""
    max_read_tokens: int = 2**26
    """The most positions that one evaluation or generation may compute; 0 if the server does not say."""


@dataclass(frozen=True)
class InexactReplay:
    """A range of steps that recovery recomputed with results that differ from the recorded ones."""

    lineage: int
    """The lineage of the steps."""
    first_step: int
    """The first of the steps."""
    last_step: int
    """The last of the steps."""
    accepted: bool
    """Whether an operator accepted the difference. If not, it was within the tolerance for rounding."""


@dataclass(frozen=True)
class MirrorStatus:
    """How much of a run has been uploaded to its mirror in an object store."""

    address: str
    """The address of the mirror."""
    acknowledge: str
    """"local", or "mirrored" if answers wait until the mirror has the steps that they report."""
    lineage: int
    """The lineage of `step`."""
    step: int
    """The newest step in the mirror; 0 if it has none."""
    segment: int
    """The number of the newest segment of records."""
    seconds_since_segment: float
    """Seconds since that segment was written."""
    checkpoint: str
    """The newest checkpoint in the mirror; empty if it has none."""
    problem: str
    """Why nothing can be uploaded now; empty if uploads succeed."""
    restored: str
    """The point from which the run was last restored from the mirror, in words; empty if it never was."""
    uploaded_bytes: int
    """The size of the batches that this process has uploaded, in bytes."""
    failures: int
    """The number of failed uploads. Each was or will be retried."""


@dataclass(frozen=True)
class RestoreResult:
    """The position of a run after one of its checkpoints was restored."""

    lineage: int
    """The number of the new lineage."""
    step: int
    """The step that the lineage starts from."""
    digest: bytes
    """The run's digest after that step, 32 bytes."""


_SHARD = re.compile(r"([a-z]+)-r\d+-\d+\.safetensors")


def unsharded_name(name: str) -> str:
    """Return the name that a checkpoint's file would have if a single process had written the checkpoint.

    For `model-r0002-001.safetensors`, which rank 2 wrote, the result is `model.safetensors`: the first file
    holds a part of the tensors of the second. Other names are returned unchanged.
    """
    found = _SHARD.fullmatch(name)
    return f"{found[1]}.safetensors" if found else name


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
