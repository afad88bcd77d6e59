"""Decodes token batches: from the proto's TokenBatch to a checked `Batch`.

The parameter `field` is the name of the batch in its request. A refusal names the field, the first
invalid position, the value and the valid values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.batch import Batch
from maskwire_server.errors import Refused, invalid_field

_DTYPES: dict[int, np.dtype[np.integer]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_UINT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
}
_DTYPE_NAMES = ", ".join(pb.DataType.Name(number) for number in _DTYPES)


def read_batch(batch: pb.TokenBatch, info: ModelInfo, limits: Limits) -> Batch:
    """Decode and check a TokenBatch. The ids are a view of the received bytes. Raises Refused."""
    ids, rows, columns, lengths = read_ids("batch", batch, info, limits)
    segment_ids = _segment_ids("batch", batch.segment_ids, ids.size)
    check_ids("batch", ids, columns, lengths, info, padded=lengths is None and segment_ids is None)
    if lengths is None:
        ids = ids.reshape(rows, columns)
    prompt_bits = read_prompt_bits("batch", batch.prompt_mask, rows, columns)
    read = Batch(ids, rows, columns, lengths, prompt_bits, segment_ids)
    if segment_ids is not None:
        _check_segments("batch", read)
    _check_something_maskable(read, info)
    return read


def read_ids(
    field: str, batch: pb.TokenBatch, info: ModelInfo, limits: Limits
) -> tuple[npt.NDArray[np.integer], int, int, npt.NDArray[np.int32] | None]:
    """Return the flat ids, the rows, the columns and the lengths. The values of the ids are not checked."""
    rows, columns = _shape(field, batch.shape, info, limits)
    dtype = _DTYPES.get(batch.dtype)
    if dtype is None:
        raise invalid_field(
            f"{field}.dtype",
            f"{field}.dtype must be one of {_DTYPE_NAMES}, got {batch.dtype}",
            value=batch.dtype,
        )
    lengths = _lengths(field, batch.lengths, rows, columns)
    count = rows * columns if lengths is None else int(lengths.sum())
    data = batch.data  # protobuf copies the bytes at each access
    if len(data) != count * dtype.itemsize:
        raise invalid_field(
            f"{field}.data",
            f"{field}.data must have {count * dtype.itemsize} bytes ({count} ids of {dtype.itemsize} bytes), "
            f"got {len(data)}",
            expected_bytes=count * dtype.itemsize,
            bytes=len(data),
        )
    return np.frombuffer(data, dtype=dtype), rows, columns, lengths


def _shape(field: str, shape: Sequence[int], info: ModelInfo, limits: Limits) -> tuple[int, int]:
    # The length is checked before the values are read: a message can hold millions of dimensions.
    if len(shape) != 2:
        raise invalid_field(
            f"{field}.shape", f"{field}.shape must be [rows, columns], got {len(shape)} dimensions"
        )
    sizes = list(shape)
    for name, size in zip(("rows", "columns"), sizes, strict=True):
        if size < 1:
            raise invalid_field(f"{field}.shape", f"{field}.shape: {name} must be at least 1, got {size}")
    rows, columns = sizes
    if columns > info.max_seq_len:
        raise invalid_field(
            f"{field}.shape",
            f"{field}.shape: a row must have at most {info.max_seq_len} tokens (max_seq_len), got {columns}",
            columns=columns,
            max_seq_len=info.max_seq_len,
        )
    if rows * columns > limits.max_batch_tokens:  # Python's integers do not overflow
        raise invalid_field(
            f"{field}.shape",
            f"{field}.shape: rows times columns must be at most {limits.max_batch_tokens} "
            f"(serve.max_batch_tokens), got {rows} x {columns}",
            tokens=rows * columns,
            max_batch_tokens=limits.max_batch_tokens,
        )
    return rows, columns


def _lengths(field: str, sent: Sequence[int], rows: int, columns: int) -> npt.NDArray[np.int32] | None:
    if not sent:
        return None
    if len(sent) != rows:
        raise invalid_field(
            f"{field}.lengths", f"{field}.lengths must have one length per row ({rows}), got {len(sent)}"
        )
    lengths = np.array(sent, dtype=np.int32)
    wrong = (lengths < 1) | (lengths > columns)
    if wrong.any():
        row = int(wrong.argmax())
        raise invalid_field(
            f"{field}.lengths",
            f"{field}.lengths: row {row} must have 1 to {columns} tokens, got {lengths[row]}",
            row=row,
            value=int(lengths[row]),
        )
    if lengths.max() != columns:
        raise invalid_field(
            f"{field}.lengths",
            f"{field}.lengths: the longest row must have {columns} tokens, as {field}.shape has "
            f"as many columns, got {lengths.max()}",
            longest=int(lengths.max()),
            columns=columns,
        )
    return lengths


def check_ids(
    field: str,
    ids: npt.NDArray[np.integer],
    columns: int,
    lengths: npt.NDArray[np.int32] | None,
    info: ModelInfo,
    *,
    padded: bool,
) -> None:
    """Raise Refused for the first invalid id among the flat `ids` of a batch.

    Ids outside the vocabulary are invalid, and so is the mask id. The pad id is valid only if the batch is
    `padded`.
    """
    reserved = {info.mask_id} if padded or info.pad_id is None else {info.mask_id, info.pad_id}
    first_wrong = min(reserved)  # every smaller id is allowed
    unsigned = ids.view(f"u{ids.itemsize}")  # a negative id becomes a large one
    if first_wrong >= 2 ** (8 * ids.itemsize):  # the type cannot represent a reserved id
        return
    top = int(unsigned.max())
    if top < first_wrong:
        return
    wrong = unsigned >= info.num_tokens if top >= info.num_tokens else np.zeros(ids.shape, dtype=bool)
    for value in reserved:
        if value <= top:
            wrong |= unsigned == value
    if wrong.any():
        raise _wrong_id(field, ids, int(wrong.argmax()), columns, lengths, info)


def _wrong_id(
    field: str,
    ids: npt.NDArray[np.integer],
    at: int,
    columns: int,
    lengths: npt.NDArray[np.int32] | None,
    info: ModelInfo,
) -> Refused:
    value = int(ids[at])
    if lengths is None:
        row, column = divmod(at, columns)
    else:
        ends = lengths.cumsum()
        row = int(np.searchsorted(ends, at, side="right"))
        column = at - int(ends[row] - lengths[row])
    if value == info.mask_id:
        right = "the mask id stands for masked positions: reserve an id for it that the data does not use"
    elif 0 <= value < info.num_tokens:
        right = "the pad id is not allowed in a batch with lengths or segment_ids: leave padding out"
    else:
        right = (
            f"ids must be 0 to {info.num_tokens - 1} (num_tokens is {info.num_tokens}), except the mask id"
        )
    return invalid_field(
        f"{field}.data",
        f"{field}.data: row {row}, column {column} is {value}; {right}",
        row=row,
        column=column,
        value=value,
    )


def read_prompt_bits(field: str, bits: bytes, rows: int, columns: int) -> bytes:
    """Check the bits of a prompt mask and return them; empty if there is no mask. Raises Refused."""
    if not bits:
        return b""
    positions = rows * columns
    size = (positions + 7) // 8
    if len(bits) != size:
        raise invalid_field(
            f"{field}.prompt_mask",
            f"{field}.prompt_mask must have {size} bytes (one bit for each of {rows} x {columns} positions), "
            f"got {len(bits)}",
            expected_bytes=size,
            bytes=len(bits),
        )
    if positions % 8 and bits[-1] >> (positions % 8):
        raise invalid_field(
            f"{field}.prompt_mask",
            f"{field}.prompt_mask: the highest {8 - positions % 8} bits of the last byte must be 0, "
            f"got {bits[-1]:#04x}",
        )
    return bits


def _segment_ids(field: str, sent: Sequence[int], count: int) -> npt.NDArray[np.int32] | None:
    if not sent:
        return None
    if len(sent) != count:
        raise invalid_field(
            f"{field}.segment_ids",
            f"{field}.segment_ids must have one number for each id of {field}.data ({count}), got "
            f"{len(sent)}",
        )
    return np.fromiter(sent, dtype=np.int32, count=count)


def _check_segments(field: str, batch: Batch) -> None:
    """Raise Refused for a segment id that is negative, or smaller than the previous one in its row."""
    numbers = batch.segment_ids
    assert numbers is not None
    falls = np.zeros(numbers.size, dtype=bool)
    falls[1:] = numbers[1:] < numbers[:-1]
    falls[batch.row_ends()[:-1]] = False  # the first id of a row has no previous one
    wrong = falls | (numbers < 0)
    if not wrong.any():
        return
    at = int(wrong.argmax())
    row = int(np.searchsorted(batch.row_ends(), at, side="right"))
    column = at - int(batch.row_ends()[row - 1] if row else 0)
    raise invalid_field(
        f"{field}.segment_ids",
        f"{field}.segment_ids: row {row}, column {column} is {numbers[at]}; the segment ids of a row must be "
        "at least 0 and must not decrease",
        row=row,
        column=column,
        value=int(numbers[at]),
    )


def _check_something_maskable(batch: Batch, info: ModelInfo) -> None:
    if batch.prompt_bits:
        _, valid, prompt = batch.dense(info.pad_id)
        some = bool((valid & ~prompt).any())
    else:
        some = batch.lengths is not None or info.pad_id is None or bool((batch.ids != info.pad_id).any())
    if not some:
        field = "batch.prompt_mask" if batch.prompt_bits else "batch.data"
        raise invalid_field(
            field,
            f"{field}: every position of every row is prompt or padding; leave at least one to predict",
        )
