"""A validated batch of tokens and how to train on it: what travels between the wings.

`rpc` makes it, `run` hashes and keeps it, `training` reads it. Letters: b rows, n columns.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskwire.v1.digest import payload_hash

# version, width of an id, rows, columns, lengths, prompt bytes, modes, temperature, learning rate
_HEADER = struct.Struct("<BBqqqqBdd")
_VERSION = 1
_WIDTHS: dict[int, str] = {1: "<u1", 2: "<u2", 4: "<i4"}


@dataclass(frozen=True)
class Batch:
    """Token ids with what they stand for.

    `lengths` says where rows end when the sender gave lengths; otherwise padding is where ids equal the
    model's pad id. `prompt_bits` are the packed bits as sent.
    """

    ids: npt.NDArray[np.integer]
    """The ids as sent: int [b, n], or with lengths int [sum of lengths]."""
    rows: int
    """b."""
    columns: int
    """n."""
    lengths: npt.NDArray[np.int32] | None = None
    """int32 [b], or None."""
    prompt_bits: bytes = b""
    """Bits over [b, n], row-major, least significant first; empty for none."""

    @property
    def tokens(self) -> int:
        """Positions that hold an id: padding given by lengths does not count."""
        return int(self.ids.size)

    def dense(
        self, pad_id: int | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """(ids int64 [b, n], valid bool [b, n], prompt bool [b, n]); ids at padding are 0."""
        shape = (self.rows, self.columns)
        if self.lengths is None:
            ids = self.ids.reshape(shape).astype(np.int64)
            valid = np.ones(shape, dtype=bool) if pad_id is None else ids != pad_id
            ids = np.where(valid, ids, 0)
        else:
            valid = np.arange(self.columns) < self.lengths[:, None]
            ids = np.zeros(shape, dtype=np.int64)
            ids[valid] = self.ids
        if not self.prompt_bits:
            return ids, valid, np.zeros(shape, dtype=bool)
        bits = np.unpackbits(np.frombuffer(self.prompt_bits, dtype=np.uint8), bitorder="little")
        prompt = bits[: self.rows * self.columns].astype(bool).reshape(shape) & valid
        return ids, valid, prompt


@dataclass(frozen=True)
class Prompts:
    """Rows to sample: the given ids, and the positions that are unknown."""

    ids: npt.NDArray[np.int64]
    """int64 [b, n], 0 where no id is given."""
    valid: npt.NDArray[np.bool_]
    """bool [b, n], False at padding."""
    known: npt.NDArray[np.bool_]
    """bool [b, n]: valid and given."""
    lengths: npt.NDArray[np.int32] | None = None
    """int32 [b], as received; None: not given."""

    @staticmethod
    def nothing(rows: int, columns: int) -> Prompts:
        """Rows in which no position is given."""
        none = np.zeros((rows, columns), dtype=bool)
        return Prompts(none.astype(np.int64), ~none, none)

    @property
    def unknown(self) -> npt.NDArray[np.bool_]:
        """bool [b, n]: the positions to sample."""
        return self.valid & ~self.known


@dataclass(frozen=True)
class Modes:
    """Which networks a step trains, and its options."""

    only_train_generator: bool = False
    only_train_critic: bool = False
    generator_sample_temperature: float | None = None
    """None: drawn from U[0, 1) with the step's random generator."""
    learning_rate: float | None = None
    """Of this step; None: the schedule's."""


@dataclass(frozen=True)
class Payload:
    """The inputs of a step, which with the run's state determine its outcome. It is hashed and journalled."""

    batch: Batch
    modes: Modes

    def hash(self) -> bytes:
        """The payload hash of `maskwire.v1`, 32 bytes."""
        batch, modes = self.batch, self.modes
        return payload_hash(
            batch.ids,
            rows=batch.rows,
            columns=batch.columns,
            lengths=() if batch.lengths is None else batch.lengths,
            prompt=batch.prompt_bits,
            only_train_generator=modes.only_train_generator,
            only_train_critic=modes.only_train_critic,
            temperature=modes.generator_sample_temperature,
            learning_rate=modes.learning_rate,
        )

    def encode(self) -> bytes:
        """The bytes that the journal keeps; `decode` reads them."""
        batch, modes = self.batch, self.modes
        top = int(batch.ids.max(initial=0))
        width = 1 if top < 2**8 else 2 if top < 2**16 else 4
        lengths = np.zeros(0, dtype="<i4") if batch.lengths is None else batch.lengths.astype("<i4")
        flags = (
            1 * modes.only_train_generator
            | 2 * modes.only_train_critic
            | 4 * (modes.generator_sample_temperature is not None)
            | 8 * (modes.learning_rate is not None)
        )
        header = _HEADER.pack(
            _VERSION,
            width,
            batch.rows,
            batch.columns,
            lengths.size,
            len(batch.prompt_bits),
            flags,
            modes.generator_sample_temperature or 0.0,
            modes.learning_rate or 0.0,
        )
        ids = batch.ids.astype(_WIDTHS[width])
        return b"".join((header, lengths.tobytes(), batch.prompt_bits, ids.tobytes()))

    @staticmethod
    def decode(data: bytes) -> Payload:
        """The payload that `encode` wrote; ValueError for another version or a wrong size."""
        version, width, rows, columns, count, prompt_bytes, flags, temperature, rate = _HEADER.unpack_from(
            data
        )
        if version != _VERSION:
            raise ValueError(f"payload version must be {_VERSION}, got {version}")
        at = _HEADER.size
        lengths = np.frombuffer(data, dtype="<i4", count=count, offset=at) if count else None
        at += 4 * count
        prompt = data[at : at + prompt_bytes]
        ids = np.frombuffer(data, dtype=_WIDTHS[width], offset=at + prompt_bytes)
        expected = rows * columns if lengths is None else int(lengths.sum())
        if ids.size != expected:
            raise ValueError(f"payload must hold {expected} ids, got {ids.size}")
        if lengths is None:
            ids = ids.reshape(rows, columns)
        modes = Modes(
            bool(flags & 1),
            bool(flags & 2),
            temperature if flags & 4 else None,
            rate if flags & 8 else None,
        )
        return Payload(Batch(ids, rows, columns, lengths, prompt), modes)
