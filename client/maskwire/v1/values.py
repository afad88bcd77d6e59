"""Values that server and client share. Losses are in nats; None means absent, never 0."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from dataclasses import dataclass


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
class TokenizerDescription:
    """A tokenizer, and the ids that its documents begin and end with; a run keeps that of its data."""

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
    generator_loss: float | None = None
    critic_loss: float | None = None


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

    generator_nats: float = 0.0
    generator_weight: float = 0.0
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
    max_generation_steps: int = 1024
    max_read_tokens: int = 2**26
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
class MirrorStatus:
    """What of a run is in its mirror, an object store."""

    address: str
    acknowledge: str
    """"local", or "mirrored": answers wait until the mirror has what they say."""
    lineage: int
    step: int
    """The newest step in the mirror; 0: none."""
    segment: int
    """The number of the newest segment of records."""
    seconds_since_segment: float
    """How long ago it was written."""
    checkpoint: str
    """The newest checkpoint in the mirror; empty: none."""
    problem: str
    """Why nothing can be uploaded now; empty: uploads succeed."""
    restored: str
    """From which point the run was last restored from the mirror, in words; empty: never."""
    uploaded_bytes: int
    """Size of the batches that this process has uploaded."""
    failures: int
    """Failed uploads, each of which was or will be tried again."""


@dataclass(frozen=True)
class RestoreResult:
    """Position of the run after a restore."""

    lineage: int
    step: int
    digest: bytes


_SHARD = re.compile(r"([a-z]+)-r\d+-\d+\.safetensors")


def whole_file(name: str) -> str:
    """The file whose tensors a file of a checkpoint holds, whole or in part.

    `model-r0002-001.safetensors`, written by rank 2, has parts of what `model.safetensors` has if one process
    writes it. Other names are returned as they are.
    """
    found = _SHARD.fullmatch(name)
    return f"{found[1]}.safetensors" if found else name
