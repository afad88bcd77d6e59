"""Batches: dense as the trainer wants them, and encoded as the journal keeps them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskwire.v1.digest import DigestVersion
from maskwire_server.batch import Batch, Modes, Payload


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    top = draw(st.sampled_from([3, 255, 256, 65_535, 65_536, 2**24]))
    lengths = None
    count = rows * columns
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, columns), min_size=rows, max_size=rows))
        sizes[draw(st.integers(0, rows - 1))] = columns
        lengths = np.array(sizes, dtype=np.int32)
        count = int(lengths.sum())
    ids = np.array(draw(st.lists(st.integers(0, top), min_size=count, max_size=count)), dtype=np.int64)
    prompt = b""
    if draw(st.booleans()):
        bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
        prompt = np.packbits(bits, bitorder="little").tobytes()
    ids = ids.astype(
        draw(st.sampled_from([t for t in ("<u1", "<u2", "<i4", "<i8") if top <= np.iinfo(t).max]))
    )
    if lengths is None:
        ids = ids.reshape(rows, columns)
    segments = None
    if draw(st.booleans()):
        numbers = draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count))
        segments = np.array(numbers, dtype=np.int32)
    modes = Modes(
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.none() | st.floats(0, 9)),
        draw(st.none() | st.floats(0, 1)),
    )
    return Payload(Batch(ids, rows, columns, lengths, prompt, segments), modes)


@given(payloads())
def test_a_payload_comes_back_from_its_bytes(payload: Payload) -> None:
    again = Payload.decode(payload.encode())
    assert again.modes == payload.modes
    assert again.batch.ids.dtype == payload.batch.ids.dtype, "as received"
    for version in (DigestVersion(1), DigestVersion(2, 2**24 + 1)):
        if version.number == 1 and payload.batch.segment_ids is not None:
            continue
        assert again.hash(version) == payload.hash(version)
    for one, two in zip(payload.batch.dense(None), again.batch.dense(None), strict=True):
        assert np.array_equal(one, two)


@given(payloads(), st.integers(0, 200))
def test_bytes_that_were_cut_off_are_not_taken_for_a_payload(payload: Payload, at: int) -> None:
    data = payload.encode()
    if at < len(data):
        with pytest.raises(Exception, match=r"."):
            Payload.decode(data[:at])


def test_dense_puts_ids_padding_and_prompts_where_they_belong() -> None:
    batch = Batch(np.array([5, 6, 7, 8]), 2, 3, np.array([1, 3], dtype=np.int32), bytes([0b001010]))
    ids, valid, prompt = batch.dense(None)
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert valid.tolist() == [[True, False, False], [True, True, True]]
    assert prompt.tolist() == [[False, False, False], [True, False, False]], "no prompt under padding"
    assert batch.tokens == 4


def test_segments_start_where_a_row_starts_and_where_the_number_changes() -> None:
    lengths, numbers = np.array([2, 4, 1], dtype=np.int32), np.array([0, 1, 1, 1, 3, 3, 3], dtype=np.int32)
    starts, sizes = Batch(np.arange(7), 3, 4, lengths, segment_ids=numbers).segments()
    assert starts.tolist() == [0, 1, 4, 6, 8]
    assert sizes.tolist() == [1, 1, 2, 2, 1]
    full = Batch(np.arange(6).reshape(2, 3), 2, 3, segment_ids=np.array([0, 0, 0, 0, 1, 1], dtype=np.int32))
    assert [each.tolist() for each in full.segments()] == [[0, 3, 4], [3, 1, 2]]
    assert full.sequences == 3
    assert Batch(full.ids, 2, 3).sequences == 2


def test_batches_without_segments_are_encoded_as_ever() -> None:
    """A journal of an older version holds these bytes, and an older version reads them."""
    payload = Payload(Batch(np.array([[1, 2]], dtype="<u1"), 1, 2), Modes())
    assert payload.encode().hex() == "0101" + "01".ljust(16, "0") + "02".ljust(16, "0") + "00" * 33 + "0102"


def test_without_lengths_the_pad_id_is_padding() -> None:
    ids, valid, _ = Batch(np.array([[1, 9, 2], [9, 9, 9]]), 2, 3).dense(9)
    assert ids.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert valid.tolist() == [[True, False, True], [False, False, False]]
