"""The history digest of `maskwire.v1`, as `training_service.proto` writes it down.

It is part of the wire contract, so the server and the client share this one implementation; the
test vectors in the proto hold it to its description.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ONLY_GENERATOR, _ONLY_CRITIC, _TEMPERATURE, _LEARNING_RATE = 1, 2, 4, 8


def payload_hash(
    ids: npt.NDArray[np.integer],
    *,
    rows: int,
    columns: int,
    lengths: Sequence[int] | npt.NDArray[np.integer] = (),
    prompt: bytes = b"",
    only_train_generator: bool = False,
    only_train_critic: bool = False,
    temperature: float | None = None,
    learning_rate: float | None = None,
) -> bytes:
    """The hash of what a step trains on and how, 32 bytes.

    `ids` are the ids as sent, in order, of any shape and integer type; `prompt` the packed bits.
    """
    modes = (
        _ONLY_GENERATOR * only_train_generator
        | _ONLY_CRITIC * only_train_critic
        | _TEMPERATURE * (temperature is not None)
        | _LEARNING_RATE * (learning_rate is not None)
    )
    sha = hashlib.sha256(b"maskwire.v1.payload\0")
    sha.update(struct.pack("<qqq", rows, columns, len(lengths)))
    sha.update(np.ascontiguousarray(lengths, dtype="<i4").data)
    sha.update(struct.pack("<q", ids.size))
    sha.update(np.ascontiguousarray(ids, dtype="<i4").data)
    sha.update(struct.pack("<q", len(prompt)))
    sha.update(prompt)
    sha.update(struct.pack("<Bdd", modes, temperature or 0.0, learning_rate or 0.0))
    return sha.digest()


def initial_digest(canonical_configuration: bytes, seed: int) -> bytes:
    """d_0 of a new run, 32 bytes."""
    return hashlib.sha256(
        b"maskwire.v1.config\0" + canonical_configuration + struct.pack("<q", seed)
    ).digest()


def step_digest(previous: bytes, lineage: int, step: int, payload: bytes, outcome: int) -> bytes:
    """d_s from d_(s-1), the step's payload hash and its `StepOutcome`, 32 bytes."""
    return hashlib.sha256(
        b"maskwire.v1.step\0"
        + previous
        + struct.pack("<qq", lineage, step)
        + payload
        + struct.pack("<i", outcome)
    ).digest()


def lineage_digest(parent: bytes, lineage: int) -> bytes:
    """The digest that a restore opens `lineage` with, 32 bytes."""
    return hashlib.sha256(b"maskwire.v1.lineage\0" + parent + struct.pack("<q", lineage)).digest()
