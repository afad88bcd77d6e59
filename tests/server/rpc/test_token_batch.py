"""The wire never raises anything but a refusal, whatever comes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwire.errors import REASONS as CLIENT_REASONS
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.errors import REASONS, Refused
from maskwire_server.rpc import token_batch
from maskwire_server.rpc.error_status import to_status

INFO = ModelInfo(17, 16, 15, 32, 1, "", True, False)
LIMITS = Limits(4096, 2**20, 8, 64)

sizes = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 40)
batches = st.builds(
    pb.TokenBatch,
    data=st.binary(max_size=64),
    shape=st.lists(sizes, max_size=3) | st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dtype=st.integers(0, 6),
    lengths=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9), max_size=8),
    prompt_mask=st.binary(max_size=9),
    segment_ids=st.lists(st.integers(-1, 3), max_size=9),
)


@settings(max_examples=500)
@given(batches)
def test_an_arbitrary_batch_is_read_or_refused_by_field(batch: pb.TokenBatch) -> None:
    try:
        read = token_batch.read_batch(batch, INFO, LIMITS)
    except Refused as refusal:
        assert refusal.reason == "INVALID_FIELD"
        assert refusal.metadata["field"].startswith("batch.")
        to_status(refusal)
    else:
        ids, valid, prompt = read.dense(INFO.pad_id)
        assert ids.shape == valid.shape == (read.rows, read.columns)
        assert (valid & ~prompt).any()
        assert ((ids >= 0) & (ids < 16)).all()


@settings(max_examples=300)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_a_good_batch_is_read_as_it_was_meant(rows: int, columns: int, data: st.DataObject) -> None:
    ids = np.array(data.draw(st.lists(st.integers(0, 14), min_size=rows * columns, max_size=rows * columns)))
    name = data.draw(st.sampled_from(["<u1", "<u2", "<i4", "<i8"]))
    number = {"<u1": 1, "<u2": 2, "<i4": 3, "<i8": 4}[name]
    sent = pb.TokenBatch(data=ids.astype(name).tobytes(), shape=[rows, columns], dtype=number)
    read: Batch = token_batch.read_batch(sent, INFO, LIMITS)
    assert np.array_equal(read.ids, ids.reshape(rows, columns))


@settings(max_examples=300)
@given(st.data())
def test_exactly_the_ids_that_a_batch_must_not_hold_are_refused_in_every_type(data: st.DataObject) -> None:
    num_tokens = data.draw(st.sampled_from([200, 256, 257, 300, 65_536, 65_537, 70_000]))
    mask_id = data.draw(st.sampled_from([0, 103, num_tokens - 1]))
    pad_id = data.draw(st.sampled_from([None, 5, num_tokens - 2]))
    info = ModelInfo(num_tokens, mask_id, pad_id, 32, 1, "", True, False)
    dtype, number = data.draw(st.sampled_from([("<u1", 1), ("<u2", 2), ("<i4", 3), ("<i8", 4)]))
    edges = [
        0,
        5,
        103,
        255,
        256,
        num_tokens - 2,
        num_tokens - 1,
        num_tokens,
        65_535,
        2**31 - 1,
        2**40,
        -1,
        -(2**20),
    ]
    held = [edge for edge in edges if np.iinfo(dtype).min <= edge <= np.iinfo(dtype).max]
    ids = data.draw(st.lists(st.sampled_from(held), min_size=1, max_size=6))
    lengths = [len(ids)] if data.draw(st.booleans()) else []
    sent = pb.TokenBatch(
        data=np.array(ids, dtype).tobytes(), shape=[1, len(ids)], dtype=number, lengths=lengths
    )
    reserved = {mask_id} | ({pad_id} if lengths else set())
    wrong = [column for column, value in enumerate(ids) if not 0 <= value < num_tokens or value in reserved]
    if wrong:
        with pytest.raises(Refused, match=rf"row 0, column {wrong[0]} is {ids[wrong[0]]};"):
            token_batch.read_batch(sent, info, LIMITS)
    elif all(value == pad_id for value in ids):
        with pytest.raises(Refused, match="prompt or padding"):
            token_batch.read_batch(sent, info, LIMITS)
    else:
        read = token_batch.read_batch(sent, info, LIMITS)
        assert read.ids.ravel().tolist() == ids
        assert Payload(read, Modes()).encode().endswith(sent.data), "the journal keeps the bytes as received"


def test_the_pad_id_is_padding_without_lengths_and_refused_with_them() -> None:
    data = bytes([1, 15, 2, 3])
    read = token_batch.read_batch(pb.TokenBatch(data=data, shape=[2, 2], dtype=1), INFO, LIMITS)
    assert read.dense(15)[1].tolist() == [[True, False], [True, True]]
    with pytest.raises(
        Refused, match="row 0, column 1 is 15; the pad id is not allowed in a batch with lengths"
    ):
        token_batch.read_batch(pb.TokenBatch(data=data, shape=[2, 2], dtype=1, lengths=[2, 2]), INFO, LIMITS)
    with pytest.raises(Refused, match="prompt or padding"):
        token_batch.read_batch(pb.TokenBatch(data=bytes([15] * 4), shape=[2, 2], dtype=1), INFO, LIMITS)


def packed(**fields: object) -> pb.TokenBatch:
    """Rows [0, 1] and [2, 3, 4], the second of two documents."""
    given = {"shape": [2, 3], "lengths": [2, 3], "segment_ids": [0, 0, 0, 1, 1], **fields}
    return pb.TokenBatch(data=bytes(range(5)), dtype=1, **given)  # type: ignore[arg-type]


def test_segments_are_read_as_they_were_meant() -> None:
    read = token_batch.read_batch(packed(), INFO, LIMITS)
    assert read.sequences == 3
    assert [each.tolist() for each in read.segments()] == [[0, 3, 4], [2, 1, 2]]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0, 0, 0, 1], "one number for each id of batch.data (5), got 4"),
        ([0, 0, 1, 0, 1], "row 1, column 1 is 0; the segment ids of a row must be at least 0 and must not"),
        ([0, -1, 0, 0, 0], "row 0, column 1 is -1"),
        ([1, 0, 0, 0, 0], "row 0, column 1 is 0"),
    ],
)
def test_segments_that_are_wrong_are_refused_by_position(numbers: list[int], words: str) -> None:
    with pytest.raises(Refused, match=re.escape(words)):
        token_batch.read_batch(packed(segment_ids=numbers), INFO, LIMITS)
    token_batch.read_batch(packed(segment_ids=[3, 3, 0, 0, 9]), INFO, LIMITS)


def test_packed_rows_are_not_padded_with_the_pad_id() -> None:
    sent = pb.TokenBatch(data=bytes([1, 15]), shape=[1, 2], dtype=1, segment_ids=[0, 0])
    with pytest.raises(Refused, match="not allowed in a batch with lengths or segment_ids"):
        token_batch.read_batch(sent, INFO, LIMITS)


def test_every_reason_of_the_server_is_one_that_the_client_knows() -> None:
    assert set(REASONS) == set(CLIENT_REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_a_refusal_travels_with_all_it_says(reason: str) -> None:
    import grpc
    from google.rpc import code_pb2, error_details_pb2

    status = to_status(Refused(reason, "text", fields={"a": "b"}, step=7))
    assert code_pb2.Code.Name(status.code) == REASONS[reason].status
    assert REASONS[reason].status in grpc.StatusCode.__members__
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds[:2] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "maskwire", {"step": "7"})
    assert ("google.rpc.RetryInfo" in kinds) == (REASONS[reason].retry_after_seconds is not None)
