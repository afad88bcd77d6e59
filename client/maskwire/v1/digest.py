"""The history digest of `maskwire.v1`, as `training_service.proto` defines it.

The digest is part of the protocol, so server and client share this implementation. The tests check it against
the test vectors in the proto, and against a second implementation of the proto's text.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VERSIONS = (1, 2)
"""The versions of the digest that this release can compute, the newest last."""

_ONLY_GENERATOR, _ONLY_CRITIC, _TEMPERATURE, _LEARNING_RATE = 1, 2, 4, 8


@dataclass(frozen=True)
class DigestVersion:
    """The way in which a run hashes the payloads of its steps. The run's first step determines it."""

    number: int
    """One of `VERSIONS`."""
    num_tokens: int = 0
    """The size of the run's vocabulary; version 1 does not use it."""

    @property
    def id_type(self) -> np.dtype[np.integer]:
        """The integer type in which token ids are hashed."""
        return np.dtype("<i4") if self.number == 1 else narrowest_type(self.num_tokens)


def narrowest_type(num_tokens: int) -> np.dtype[np.integer]:
    """Return the narrowest of uint8, uint16 and int32 that holds the ids 0 to `num_tokens` - 1."""
    return np.dtype("<u1" if num_tokens <= 2**8 else "<u2" if num_tokens <= 2**16 else "<i4")


def newest_common(offered: Iterable[int]) -> int:
    """Return the newest of the offered versions that this release can compute; 0 if there is none."""
    return max(set(offered) & set(VERSIONS), default=0)


VERSION_1 = DigestVersion(1)


def payload_hash(
    ids: npt.NDArray[np.integer],
    version: DigestVersion = VERSION_1,
    *,
    rows: int,
    columns: int,
    lengths: Sequence[int] | npt.NDArray[np.integer] = (),
    prompt: bytes = b"",
    segments: Sequence[int] | npt.NDArray[np.integer] = (),
    only_train_generator: bool = False,
    only_train_critic: bool = False,
    temperature: float | None = None,
    learning_rate: float | None = None,
) -> bytes:
    """Return the hash, 32 bytes, of a step's payload: its batch and its training options.

    `ids` are the token ids as sent, in order, in an array of any shape and integer type; ids that already
    have the type of the hash are not copied. `prompt` is the packed bits of the prompt mask, and `segments`
    are the segment ids, both as sent. A temperature or learning rate of -0.0 is hashed as 0.0. Raises
    ValueError for an id that the type of the hash cannot hold, and for segments in version 1, which does not
    cover them.
    """
    modes = (
        _ONLY_GENERATOR * only_train_generator
        | _ONLY_CRITIC * only_train_critic
        | _TEMPERATURE * (temperature is not None)
        | _LEARNING_RATE * (learning_rate is not None)
    )
    id_type = version.id_type
    if version.number == 1:
        if len(segments):
            raise ValueError(
                "segment_ids needs digest version 2, but this run has version 1: send each segment as a row "
                "of its own, with lengths, or start a new run"
            )
        prefix, of_segments = b"maskwire.v1.payload\0", b""
    else:
        prefix = b"maskwire.v2.payload\0" + struct.pack("<B", id_type.itemsize)
        of_segments = struct.pack("<q", len(segments)) + np.asarray(segments, dtype="<i4").tobytes()
    sha = hashlib.sha256(
        b"".join(
            (
                prefix,
                struct.pack("<qqq", rows, columns, len(lengths)),
                np.asarray(lengths, dtype="<i4").tobytes(),
                struct.pack("<q", ids.size),
            )
        )
    )
    sha.update(with_id_type(ids, id_type).data)
    sha.update(
        b"".join(
            (
                struct.pack("<q", len(prompt)),
                prompt,
                of_segments,
                struct.pack("<Bdd", modes, temperature or 0.0, learning_rate or 0.0),
            )
        )
    )
    return sha.digest()


def with_id_type(ids: npt.NDArray[np.integer], id_type: np.dtype[np.integer]) -> npt.NDArray[np.integer]:
    """Return the ids as a contiguous array of type `id_type`. Ids that have this type are not copied.

    Raises ValueError for an id that the type cannot hold.
    """
    if ids.size and not np.can_cast(ids.dtype, id_type):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > np.iinfo(id_type).max:
            raise ValueError(
                f"token ids must be 0 to {np.iinfo(id_type).max} to be hashed as {id_type.name}, got "
                f"{low if low < 0 else high}"
            )
    return np.ascontiguousarray(ids, dtype=id_type)


def initial_digest(canonical_configuration: bytes, seed: int) -> bytes:
    """Return the digest d_0 with which a new run starts, 32 bytes, from its configuration and seed."""
    return hashlib.sha256(
        b"maskwire.v1.config\0" + canonical_configuration + struct.pack("<q", seed)
    ).digest()


def step_digest(previous: bytes, lineage: int, step: int, payload: bytes, outcome: int) -> bytes:
    """Return the digest after a step, 32 bytes.

    previous: The digest after the previous step.
    payload: The payload hash of the step.
    outcome: The number of the step's `StepOutcome`.
    """
    return hashlib.sha256(
        b"maskwire.v1.step\0"
        + previous
        + struct.pack("<qq", lineage, step)
        + payload
        + struct.pack("<i", outcome)
    ).digest()


def lineage_digest(parent: bytes, lineage: int) -> bytes:
    """Return the digest with which a restore starts `lineage`, 32 bytes, from the checkpoint's digest."""
    return hashlib.sha256(b"maskwire.v1.lineage\0" + parent + struct.pack("<q", lineage)).digest()
