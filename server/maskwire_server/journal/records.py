"""The journal's records: steps, lineages and sessions, with hashes that reveal damage."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

from maskwire.v1.values import Losses, Outcome
from maskwire_server.errors import RunDirectoryError

_NUMBERS = struct.Struct("<Bdddd")  # presence bits, loss, generator loss, critic loss, gradient norm


@dataclass(frozen=True)
class StepRecord:
    """The record of a step, whatever its outcome."""

    lineage: int
    step: int
    request_id: str | None
    configuration: int
    """The id of the event with the configuration that the step was computed with."""
    payload_hash: bytes
    outcome: Outcome
    losses: Losses
    gradient_norm: float | None
    digest: bytes

    def numbers(self) -> bytes:
        """The losses and the gradient norm as bytes, which an exact replay reproduces."""
        values = (self.losses.generator_loss, self.losses.critic_loss, self.gradient_norm)
        present = sum(1 << bit for bit, value in enumerate(values) if value is not None)
        return _NUMBERS.pack(
            present, self.losses.loss, *(0.0 if value is None else value for value in values)
        )

    def row_hash(self) -> bytes:
        """The SHA-256 of all other columns of the record's row."""
        name = b"" if self.request_id is None else b"\1" + self.request_id.encode()
        fixed = struct.pack("<qqqi", self.lineage, self.step, self.configuration, self.outcome)
        return hashlib.sha256(fixed + self.payload_hash + self.digest + self.numbers() + name).digest()

    @staticmethod
    def read(row: tuple[Any, ...]) -> StepRecord:
        """Parse a row of `steps`. Raises RunDirectoryError if the row does not match its hash."""
        lineage, step, request_id, configuration, payload_hash, outcome, numbers, digest, row_hash = row
        try:
            present, loss, *values = _NUMBERS.unpack(numbers)
            generator, critic, norm = (
                value if present & (1 << bit) else None for bit, value in enumerate(values)
            )
            record = StepRecord(
                lineage,
                step,
                request_id,
                configuration,
                payload_hash,
                Outcome(outcome),
                Losses(loss, generator, critic),
                norm,
                digest,
            )
            whole = record.row_hash() == row_hash
        except (ValueError, TypeError, AttributeError, struct.error):  # the data is damaged
            whole = False
        if not whole:
            raise damaged(f"the record of step {step} (lineage {lineage})")
        return record


@dataclass(frozen=True)
class Lineage:
    """A branch of the run's history: the first, or one that a restore or an accepted loss started."""

    lineage: int
    parent: int | None
    step: int
    """The step after which the lineage starts."""
    digest: bytes
    """The digest with which its digest chain starts."""
    request_id: str | None
    checkpoint: str | None

    def row_hash(self) -> bytes:
        """The SHA-256 of all other columns of the record's row."""
        return seal(self.lineage, self.parent, self.step, self.digest.hex(), self.request_id, self.checkpoint)

    @staticmethod
    def read(row: tuple[Any, ...]) -> Lineage:
        """Parse a row of `lineages`. Raises RunDirectoryError if the row does not match its hash."""
        record = Lineage(*row[:-1])
        if not isinstance(record.digest, bytes) or record.row_hash() != row[-1]:
            raise damaged(f"the record of lineage {record.lineage}")
        return record


@dataclass(frozen=True)
class Stretch:
    """A range of steps of one lineage: those after `after`, up to and including `through`."""

    lineage: int
    after: int
    through: int = 2**63 - 1


@dataclass(frozen=True)
class SessionRecord:
    """The record of a writer's session. Each epoch has one."""

    epoch: int
    client_name: str
    nonce: str | None
    """None for an epoch that a restore opened to fence the writer of the old lineage."""
    takeover: bool
    lineage: int
    step: int
    closed: bool

    def row_hash(self) -> bytes:
        """The SHA-256 of all other columns of the record's row."""
        return seal(
            self.epoch, self.client_name, self.nonce, self.takeover, self.lineage, self.step, self.closed
        )

    @staticmethod
    def read(row: tuple[Any, ...]) -> SessionRecord:
        """Parse a row of `sessions`. Raises RunDirectoryError if the row does not match its hash."""
        epoch, client_name, nonce, takeover, lineage, step, closed, row_hash = row
        record = SessionRecord(epoch, client_name, nonce, bool(takeover), lineage, step, bool(closed))
        if record.row_hash() != row_hash:
            raise damaged(f"the record of epoch {epoch}")
        return record


def seal(*values: object) -> bytes:
    """The SHA-256 of values, which are encoded so that different values give different bytes."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).digest()


def sealed_text(text: str) -> str:
    """A text with its SHA-256, in hexadecimal, in front of it."""
    return hashlib.sha256(text.encode()).hexdigest() + text


def text_of(sealed: object) -> str | None:
    """The text that was passed to `sealed_text`; None if the result was changed since."""
    text = sealed if isinstance(sealed, str) else ""  # a changed byte can change a value's type
    return text[64:] if text and sealed_text(text[64:]) == text else None


def damaged(what: str) -> RunDirectoryError:
    """The error for a part of the journal, `what`, that does not match its hash."""
    return RunDirectoryError(
        f"journal: {what} does not match its hash: the file was damaged; restore the run directory from a "
        "copy"
    )
