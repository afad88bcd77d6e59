"""Conversion of arrays and lists of token ids to the message TokenBatch, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwire import arguments
from maskwire.batch import Batch
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import narrowest_type

_DTYPES: dict[np.dtype[Any], pb.DataType] = {
    np.dtype("<u1"): pb.DATA_TYPE_UINT8,
    np.dtype("<u2"): pb.DATA_TYPE_UINT16,
    np.dtype("<i4"): pb.DATA_TYPE_INT32,
    np.dtype("<i8"): pb.DATA_TYPE_INT64,
}


def to_array(tokens: Any, name: str = "tokens") -> npt.NDArray[np.integer[Any]]:
    """Convert an array, a list or a torch tensor to a numpy array of integers, without importing torch.

    Raises TypeError for values that are no integers, and ValueError for ids of 2^63 or more.
    """
    array = _host(tokens)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.dtype == np.uint64:
        if array.size and int(array.max()) >= 2**63:
            raise ValueError(f"{name} must be below 2^63, got {int(array.max())}")
        return array.astype(np.int64)  # numpy would promote uint64 and int64 to float64
    return array


def _host(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def encode_batch(
    tokens: Any,
    num_tokens: int = 0,
    *,
    lengths: Any = None,
    prompt_mask: Any = None,
    segment_ids: Any = None,
    into: pb.TokenBatch | None = None,
) -> pb.TokenBatch:
    """Make a TokenBatch from rows of token ids.

    tokens: An integer array [rows, columns], a list of rows that may differ in length, or a `Batch`, which
        has its own lengths, prompt mask and segment ids.
    num_tokens: The size of the vocabulary; 0 if not known.
    lengths: Integers [rows]. The positions after a row's length are padding and are not sent.
    prompt_mask: A bool array [rows, columns], True for positions that are given and never masked. For rows
        that differ in length it may also be a list of rows.
    segment_ids: The document of a packed row to which each token belongs, in the shape of `tokens`: numbers
        from 0 that do not decrease within a row.
    into: An empty TokenBatch to fill. Pass a request's own batch field to avoid copying the ids.
    """
    if isinstance(tokens, Batch):
        arguments.check_not_given(
            "a Batch", lengths=lengths, prompt_mask=prompt_mask, segment_ids=segment_ids
        )
        about = {name: value for name, value in vars(tokens).items() if name != "tokens"}
        return encode_batch(tokens.tokens, num_tokens, **about, into=into)
    arguments.check_rows(tokens)
    if isinstance(tokens, Sequence) and len({np.shape(row) for row in tokens}) > 1:
        if lengths is not None:
            raise ValueError("lengths must be left out when tokens is a list of rows that differ in length")
        empty = next((number for number, row in enumerate(tokens) if not len(row)), None)
        if empty is not None:
            raise ValueError(f"tokens: row {empty} is empty; leave this row out")
        rows = [to_array(row) for row in tokens]
        for number, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(
                    f"tokens: row {number} must be a row of ids, got shape {list(row.shape)}; use "
                    "maskwire.Batch to pass lengths, a prompt mask or segment ids with the rows"
                )
        sizes = np.array([row.size for row in rows], dtype=np.int32)
        ids, shape = np.concatenate(rows), (len(rows), int(sizes.max()))
        sent = np.ones(ids.shape, dtype=bool)
    else:
        ids = _host(tokens)
        if not ids.size:  # an empty list has no integer type
            raise ValueError(
                f"tokens must have at least one row and one column, got an empty batch {list(ids.shape)}"
            )
        ids = to_array(ids)
        if ids.ndim != 2:
            raise ValueError(f"tokens must have two dimensions, [rows, columns], got {ids.ndim}")
        shape, sizes = (ids.shape[0], ids.shape[1]), np.zeros(0, dtype=np.int32)
        sent = np.ones(shape, dtype=bool)
        if lengths is not None:
            sizes = _lengths(lengths, shape)
            sent = np.arange(shape[1]) < sizes[:, None]
            ids = ids[sent]
            shape = (shape[0], int(sizes.max(initial=0)))
    data = _narrow(ids, num_tokens)
    prompt = _pack(prompt_mask, shape, sizes)
    segments = _segments(segment_ids, sent)
    batch = pb.TokenBatch() if into is None else into
    batch.data, batch.dtype, batch.prompt_mask = data.tobytes(), _DTYPES[data.dtype], prompt
    batch.shape.extend(shape)
    batch.lengths.extend(sizes.tolist())
    batch.segment_ids.extend(segments.tolist())
    return batch


def _segments(segment_ids: Any, sent: npt.NDArray[np.bool_]) -> npt.NDArray[np.integer[Any]]:
    """Return the segment ids of the tokens that are sent, as a flat array.

    `sent` has the shape of the tokens, and is True for a token that is sent.
    """
    if segment_ids is None:
        return np.zeros(0, dtype=np.int32)
    if sent.ndim == 1:  # rows that differ in length
        numbers = np.concatenate([to_array(row, "segment_ids") for row in segment_ids])
    else:
        numbers = to_array(segment_ids, "segment_ids")
    if numbers.shape != sent.shape:
        raise ValueError(
            f"segment_ids must have one number per token, shape {list(sent.shape)}, got {list(numbers.shape)}"
        )
    found = numbers[sent]
    low, high = int(found.min(initial=0)), int(found.max(initial=0))
    if low < 0 or high >= 2**31:
        raise ValueError(f"segment_ids must be from 0 to 2^31 - 1, got {low if low < 0 else high}")
    return found


def _lengths(lengths: Any, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
    rows, columns = shape
    sizes = to_array(lengths, "lengths")
    if sizes.shape != (rows,):
        raise ValueError(f"lengths must have one length per row ({rows} rows), got shape {sizes.shape}")
    wrong = np.flatnonzero((sizes < 1) | (sizes > columns))
    if wrong.size:
        raise ValueError(
            f"lengths must be 1 to {columns}, the columns of tokens, got {int(sizes[wrong[0]])} for row "
            f"{int(wrong[0])}"
        )
    return sizes.astype(np.int32)


def _narrow(ids: npt.NDArray[np.integer[Any]], num_tokens: int) -> npt.NDArray[np.integer[Any]]:
    """Return the ids in the integer type in which they are sent.

    This is the type that the digest hashes, so that neither side converts them. Ids of a narrower type keep
    their type. Ids outside the vocabulary are sent too, because the server's error names their position.
    """
    if num_tokens:
        id_type, own = narrowest_type(num_tokens), ids.dtype.newbyteorder("<")
        if np.can_cast(own, id_type):
            return ids.astype(own if own in _DTYPES else id_type, copy=False)
        if int(ids.min()) >= 0 and int(ids.max()) < num_tokens:
            return ids.astype(id_type)
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low >= 0 and high < 2**16:
        return ids.astype("<u1" if high < 2**8 else "<u2", copy=False)
    return ids.astype("<i4" if low >= -(2**31) and high < 2**31 else "<i8", copy=False)


def _pack(prompt_mask: Any, shape: tuple[int, int], sizes: npt.NDArray[np.int32]) -> bytes:
    if prompt_mask is None:
        return b""
    if isinstance(prompt_mask, Sequence) and len({np.shape(row) for row in prompt_mask}) > 1:
        mask = _padded(prompt_mask, shape, sizes)
    else:
        mask = _host(prompt_mask)
    if mask.dtype != np.bool_ or mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise ValueError(
            f"prompt_mask must have type bool and shape [{shape[0]}, {shape[1]}], got {mask.dtype} and "
            f"{mask.shape}"
        )
    return np.packbits(mask[:, : shape[1]], bitorder="little").tobytes()


def _padded(prompt_mask: Sequence[Any], shape: tuple[int, int], sizes: npt.NDArray[np.int32]) -> Any:
    """Return the prompt mask of rows that differ in length as one bool array [rows, columns]."""
    if len(prompt_mask) != shape[0]:
        raise ValueError(f"prompt_mask must have as many rows as tokens ({shape[0]}), got {len(prompt_mask)}")
    padded = np.zeros(shape, dtype=bool)
    for number, values in enumerate(prompt_mask):
        row, size = _host(values), int(sizes[number]) if sizes.size else shape[1]
        if row.dtype != np.bool_ or row.shape != (size,):
            raise ValueError(
                f"prompt_mask: row {number} must have type bool and shape [{size}], one value per token, got "
                f"{row.dtype} and {list(row.shape)}"
            )
        padded[number, :size] = row
    return padded


def encode_batches(batches: Iterable[Any], num_tokens: int, into: pb.TokenBatch) -> None:
    """Fill an empty TokenBatch with the rows of all `batches`, in order, as `encode_batch` encodes them.

    Each batch is a `Batch` or rows of token ids. Batches of different width become rows of different length.
    A batch without a prompt mask has no prompts, and a row of a batch without segment ids is one segment.
    Errors are TypeError or ValueError, and name the batch by its index.
    """
    encoded = []
    for index, given in enumerate(batches):
        try:
            encoded.append(encode_batch(given, num_tokens))
        except (TypeError, ValueError) as error:
            raise type(error)(f"batches[{index}]: {error}") from error
    if not encoded:
        raise ValueError("batches must have at least one batch, got none")
    _concatenate(encoded, into)


def _concatenate(batches: Sequence[pb.TokenBatch], into: pb.TokenBatch) -> None:
    ids = [ids_of(batch) for batch in batches]
    rows = sum(batch.shape[0] for batch in batches)
    columns = max(batch.shape[1] for batch in batches)
    if any(batch.lengths or batch.shape[1] != columns for batch in batches):
        for batch in batches:
            into.lengths.extend(batch.lengths or [batch.shape[1]] * batch.shape[0])
    if any(batch.prompt_mask for batch in batches):
        mask = np.zeros((rows, columns), dtype=bool)
        row = 0
        for batch in batches:
            height, width = batch.shape
            if batch.prompt_mask:
                bits = np.frombuffer(batch.prompt_mask, dtype=np.uint8)
                mask[row : row + height, :width] = np.unpackbits(
                    bits, count=height * width, bitorder="little"
                ).reshape(height, width)
            row += height
        into.prompt_mask = np.packbits(mask, bitorder="little").tobytes()
    if any(batch.segment_ids for batch in batches):
        for batch, found in zip(batches, ids, strict=True):
            into.segment_ids.extend(batch.segment_ids or [0] * found.size)
    joined = np.concatenate(ids)
    into.data, into.dtype = joined.tobytes(), _DTYPES[joined.dtype.newbyteorder("<")]
    into.shape.extend((rows, columns))


def decode_batch(batch: pb.TokenBatch) -> npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]:
    """Return the rows of a TokenBatch: int64 [rows, columns], or a list of rows if they differ in length."""
    ids = ids_of(batch).astype(np.int64)
    if len(set(batch.lengths)) > 1:
        return np.split(ids, np.cumsum(batch.lengths)[:-1])
    return ids.reshape(tuple(batch.shape))


def ids_of(batch: pb.TokenBatch) -> npt.NDArray[np.integer[Any]]:
    """Return the ids of a TokenBatch as a flat array, in the integer type in which they are sent."""
    dtype = next(dtype for dtype, number in _DTYPES.items() if number == batch.dtype)
    return np.frombuffer(batch.data, dtype=dtype)
