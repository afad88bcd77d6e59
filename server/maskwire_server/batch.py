"""A validated batch of token ids, and the options for training on it.

`rpc` creates a batch, `engine` hashes it, `journal` stores it, and `training` computes with it. In shapes, b
is the number of rows and n the number of columns.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskwire.v1.digest import DigestVersion, payload_hash

# version, bytes per id, rows, columns, lengths, prompt bytes, modes, temperature, learning rate
_HEADER = struct.Struct("<BBqqqqBdd")
_PLAIN, _WITH_SEGMENTS = 1, 2
"""Versions of the encoding. The second has the segment ids (int32) after the lengths."""
_ID_TYPES: dict[int, np.dtype[np.integer]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<i4"),
    8: np.dtype("<i8"),
}


@dataclass(frozen=True)
class Batch:
    """The token ids of a batch, and which positions are padding or belong to a prompt.

    If the sender gave `lengths`, they say where rows end. Otherwise, positions with the model's pad id are
    padding.
    """

    ids: npt.NDArray[np.integer]
    """The ids as received: int [b, n] or, with lengths, int [sum of lengths]."""
    rows: int
    """The number of rows, b."""
    columns: int
    """The number of columns, n."""
    lengths: npt.NDArray[np.int32] | None = None
    """The number of ids in each row, int32 [b]; None if the sender gave none."""
    prompt_bits: bytes = b""
    """One bit per position of [b, n], set in prompts; row-major, least significant first; empty if none."""
    segment_ids: npt.NDArray[np.int32] | None = None
    """int32, one per id. Equal consecutive numbers in a row form a sequence; None: each row is a sequence."""

    @property
    def tokens(self) -> int:
        """The number of ids received. Padding is not counted if the batch has lengths."""
        return int(self.ids.size)

    @property
    def sequences(self) -> int:
        """The number of sequences for the objective: segments if the batch has them, otherwise rows."""
        return self.rows if self.segment_ids is None else int(self.segments()[0].size)

    def segments(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return where each segment starts in the flattened [b, n] grid, and its number of ids.

        Both are int64 arrays with one entry per segment.
        """
        assert self.segment_ids is not None
        ends = self.row_ends()
        first = np.concatenate(([True], self.segment_ids[1:] != self.segment_ids[:-1]))
        first[ends[:-1]] = True  # each row starts a segment
        at = np.flatnonzero(first)
        row = np.searchsorted(ends, at, side="right")
        begins = np.concatenate(([0], ends[:-1]))
        return row * self.columns + at - begins[row], np.diff(np.append(at, self.segment_ids.size))

    def row_ends(self) -> npt.NDArray[np.int64]:
        """Return the end (exclusive) of each row in the ids as received, int64 [b]."""
        if self.lengths is None:
            return np.arange(1, self.rows + 1, dtype=np.int64) * self.columns
        return self.lengths.cumsum(dtype=np.int64)

    def dense(
        self, pad_id: int | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return the ids, which positions are valid, and which belong to a prompt: three arrays [b, n].

        The ids are int64, and 0 at padding. The other two arrays are bool. Padding is not valid.
        """
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
    """Rows to sample: their given ids, and which positions are unknown."""

    ids: npt.NDArray[np.int64]
    """The given ids, int64 [b, n]; 0 where no id is given."""
    valid: npt.NDArray[np.bool_]
    """Whether a position is not padding, bool [b, n]."""
    known: npt.NDArray[np.bool_]
    """Whether a position is valid and its id is given, bool [b, n]."""
    lengths: npt.NDArray[np.int32] | None = None
    """The lengths of the rows as received, int32 [b]; None if not given."""

    @staticmethod
    def nothing(rows: int, columns: int) -> Prompts:
        """Return rows in which every position is unknown."""
        none = np.zeros((rows, columns), dtype=bool)
        return Prompts(none.astype(np.int64), ~none, none)

    @property
    def unknown(self) -> npt.NDArray[np.bool_]:
        """The positions to sample, bool [b, n]."""
        return self.valid & ~self.known


@dataclass(frozen=True)
class Modes:
    """Which networks (generator, critic) a step trains, and the options of the step."""

    only_train_generator: bool = False
    only_train_critic: bool = False
    generator_sample_temperature: float | None = None
    """Temperature of the generator's samples. None: drawn from U[0, 1) with the step's random generator."""
    learning_rate: float | None = None
    """The learning rate of this step; None for that of the schedule."""


@dataclass(frozen=True)
class Payload:
    """The inputs of a step: its batch and its modes. They are hashed and recorded in the journal.

    Together with the run's state, they determine the result of the step.
    """

    batch: Batch
    modes: Modes

    def hash(self, version: DigestVersion) -> bytes:
        """Return the payload hash (32 bytes) that the protocol `maskwire.v1` defines for a digest version."""
        batch, modes = self.batch, self.modes
        return payload_hash(
            batch.ids,
            version,
            rows=batch.rows,
            columns=batch.columns,
            lengths=() if batch.lengths is None else batch.lengths,
            prompt=batch.prompt_bits,
            segments=() if batch.segment_ids is None else batch.segment_ids,
            only_train_generator=modes.only_train_generator,
            only_train_critic=modes.only_train_critic,
            temperature=modes.generator_sample_temperature,
            learning_rate=modes.learning_rate,
        )

    def encode(self) -> bytes:
        """Encode the payload for the journal. Ids keep the width in bytes with which they were received."""
        batch, modes = self.batch, self.modes
        id_type = _ID_TYPES[batch.ids.itemsize]
        lengths = np.zeros(0, dtype="<i4") if batch.lengths is None else batch.lengths.astype("<i4")
        flags = (
            1 * modes.only_train_generator
            | 2 * modes.only_train_critic
            | 4 * (modes.generator_sample_temperature is not None)
            | 8 * (modes.learning_rate is not None)
        )
        segments = np.zeros(0, dtype="<i4") if batch.segment_ids is None else batch.segment_ids.astype("<i4")
        header = _HEADER.pack(
            _WITH_SEGMENTS if segments.size else _PLAIN,
            id_type.itemsize,
            batch.rows,
            batch.columns,
            lengths.size,
            len(batch.prompt_bits),
            flags,
            modes.generator_sample_temperature or 0.0,
            modes.learning_rate or 0.0,
        )
        ids = np.ascontiguousarray(batch.ids, dtype=id_type)
        return b"".join((header, lengths.data, segments.data, batch.prompt_bits, ids.data))

    @staticmethod
    def decode(data: bytes) -> Payload:
        """Decode a payload that `encode` wrote. Raises ValueError or struct.error if it is damaged."""
        version, width, rows, columns, count, prompt_bytes, flags, temperature, rate = _HEADER.unpack_from(
            data
        )
        if version not in (_PLAIN, _WITH_SEGMENTS) or width not in _ID_TYPES:
            raise ValueError(
                f"an encoded batch must have version {_PLAIN} or {_WITH_SEGMENTS} and 1, 2, 4 or 8 bytes per "
                f"id, got version {version} and {width} bytes: it is damaged, or a newer version wrote it"
            )
        at = _HEADER.size
        lengths = np.frombuffer(data, dtype="<i4", count=count, offset=at) if count else None
        at += 4 * count
        expected = rows * columns if lengths is None else int(lengths.sum())
        segments = None
        if version == _WITH_SEGMENTS:
            segments = np.frombuffer(data, dtype="<i4", count=expected, offset=at)
            at += 4 * expected
        prompt = data[at : at + prompt_bytes]
        ids = np.frombuffer(data, dtype=_ID_TYPES[width], offset=at + prompt_bytes)
        if ids.size != expected:
            raise ValueError(f"an encoded batch must hold {expected} ids, got {ids.size}: it is damaged")
        if lengths is None:
            ids = ids.reshape(rows, columns)
        modes = Modes(
            bool(flags & 1),
            bool(flags & 2),
            temperature if flags & 4 else None,
            rate if flags & 8 else None,
        )
        return Payload(Batch(ids, rows, columns, lengths, prompt, segments), modes)
