"""Values that server and client share. Losses are in nats; None means absent, never 0."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from dataclasses import dataclass


class _Known(enum.IntEnum):
    """An enum of the protocol. Values of a newer server become UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> _Known | None:  # noqa: ARG003
        return cls(0)


class Outcome(_Known):
    """Outcome of a consumed step."""

    UNKNOWN = 0
    """An outcome of a newer server."""
    APPLIED = 1
    """The update was applied."""
    SKIPPED_NON_FINITE = 2
    """A loss or the gradient was not finite: the step counts, the weights did not change."""
    OUT_OF_MEMORY = 3
    """The device ran out of memory before the update: the step counts, the weights did not change."""
    POISON = 4
    """The batch crashed the server several times and was set aside: the weights did not change."""


class RunState(_Known):
    """State of the run."""

    UNKNOWN = 0
    """A state of a newer server."""
    RECOVERING = 1
    """A checkpoint is loaded and the journal replayed."""
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
    """A tokenizer, and the ids that its documents begin and end with; a run keeps the one of its data."""

    name: str
    """"bytes", or "sha256:" and the hash of the tokenizer's file."""
    file: bytes = b""
    """The content of the tokenizer's file, a tokenizer.json; empty for bytes."""
    document_start: tuple[int, ...] = ()
    """The special ids that each document begins with, such as BOS."""
    document_end: tuple[int, ...] = ()
    """The special ids that each document ends with, such as EOS."""

    @property
    def digest(self) -> str:
        """A hash by which a client sees whether the run keeps the same description."""
        parts = [self.name, list(self.document_start), list(self.document_end)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Losses:
    """Losses of a step or an evaluation. `loss` is the one that training minimises."""

    loss: float
    """What training minimises."""
    generator_loss: float | None = None
    """The generator's masked cross-entropy; None: only the critic was trained."""
    critic_loss: float | None = None
    """The critic's binary cross-entropy; None: no critic, or only the generator was trained."""


@dataclass(frozen=True)
class RowResult:
    """One row's sum, so that evaluations combine exactly."""

    row_id: int
    """The row's id."""
    nats: float
    """The row's negative ELBO or, by the chain rule, its negative log-likelihood."""
    tokens: int
    """The row's maskable positions."""
    half_difference: float | None = None
    """First half of the draws minus the second half, in nats; it gives the error of the draws."""


@dataclass(frozen=True)
class LossSums:
    """Numerators and denominators of an evaluation's losses, which add up over several calls."""

    generator_nats: float = 0.0
    """The generator's loss times its weight."""
    generator_weight: float = 0.0
    """What the generator's loss is a mean over."""
    critic_nats: float | None = None
    """The critic's loss times its weight; None: no critic."""
    critic_weight: float | None = None
    """What the critic's loss is a mean over; None: no critic."""
    critic_loss_weight: float = 1.0
    """The critic's share of the total loss."""


@dataclass(frozen=True)
class FractionResult:
    """The part of an evaluation whose masked fraction is in (low, high]."""

    low: float
    """The lower end, exclusive."""
    high: float
    """The upper end, inclusive."""
    nats_per_masked_token: float | None
    """None: nothing was masked in this part."""
    accuracy: float | None
    """The share of masked positions whose most probable token was right; None: nothing was masked."""
    masked_tokens: int
    """The number of masked positions."""


@dataclass(frozen=True)
class ModelInfo:
    """The served model."""

    num_tokens: int
    """The size of the vocabulary, the mask id included."""
    mask_id: int
    """The id that stands for a masked position; refused in data."""
    pad_id: int | None
    """The id that stands for padding; None: the model has none."""
    max_seq_len: int
    """The longest row that the model takes, in tokens."""
    parameters: int
    """The number of trainable parameters."""
    objective: str
    """The objective, in words: preset, schedule, masking and weighting."""
    loss_is_bound: bool
    """Whether the generator's loss estimates a bound on the likelihood."""
    has_critic: bool
    """Whether the model has a critic."""
    self_cond: bool = False
    """Self-conditioning: each pass of an evaluation or generation runs the model twice."""


@dataclass(frozen=True)
class Limits:
    """The server's limits on one request."""

    max_batch_tokens: int
    """The most positions (rows times columns) in one batch."""
    max_message_bytes: int
    """The largest message."""
    window: int
    """The most steps in flight in a session."""
    max_draws: int
    """The most evaluation draws per row."""
    max_generation_steps: int = 1024
    """The most unmasking passes per row."""
    max_read_tokens: int = 2**26
    """The most positions that one evaluation or generation may compute; 0: the server does not say."""


@dataclass(frozen=True)
class InexactReplay:
    """Steps that recovery recomputed with results that were close to the recorded ones but not equal."""

    lineage: int
    """The lineage of the steps."""
    first_step: int
    """The first of the steps."""
    last_step: int
    """The last of the steps."""
    accepted: bool
    """An operator accepted the difference; otherwise it was within the tolerance for rounding."""


@dataclass(frozen=True)
class MirrorStatus:
    """Which part of a run its mirror, an object store, holds."""

    address: str
    """Where the mirror is."""
    acknowledge: str
    """"local", or "mirrored": answers wait until the mirror holds the steps that they report."""
    lineage: int
    """The lineage of `step`."""
    step: int
    """The newest step in the mirror; 0: none."""
    segment: int
    """The number of the newest segment of records."""
    seconds_since_segment: float
    """How long ago that segment was written."""
    checkpoint: str
    """The newest checkpoint in the mirror; empty: none."""
    problem: str
    """Why nothing can be uploaded now; empty: uploads succeed."""
    restored: str
    """From which point the run was last restored from the mirror, in words; empty: never."""
    uploaded_bytes: int
    """Size of the batches that this process has uploaded."""
    failures: int
    """Failed uploads, each of which was or will be retried."""


@dataclass(frozen=True)
class RestoreResult:
    """Position of the run after a restore."""

    lineage: int
    """The number of the new lineage."""
    step: int
    """The step that the lineage starts from."""
    digest: bytes
    """The run's digest after that step, 32 bytes."""


_SHARD = re.compile(r"([a-z]+)-r\d+-\d+\.safetensors")


def unsharded_name(name: str) -> str:
    """Return the name that a checkpoint's file would have if one process wrote it.

    For `model-r0002-001.safetensors`, written by rank 2, it is `model.safetensors`: the file holds a part of
    its tensors. Other names are returned as they are.
    """
    found = _SHARD.fullmatch(name)
    return f"{found[1]}.safetensors" if found else name
