"""The digest against the proto's own description: its test vectors, and a second reading of its text."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskwire.v1.digest import (
    DigestVersion,
    initial_digest,
    lineage_digest,
    newest_common,
    payload_hash,
    step_digest,
    with_id_type,
)

PROTO = Path(__file__).resolve().parents[2] / "proto" / "maskwire" / "v1" / "training_service.proto"
KINDS = [DigestVersion(1), DigestVersion(2, 256), DigestVersion(2, 257), DigestVersion(2, 65_537)]


def test_the_vectors_written_in_the_proto() -> None:
    vectors = re.findall(r"^//\s+([0-9a-f]{64})$", PROTO.read_text(), re.MULTILINE)
    a, b = np.array([[1, 2], [3, 4]]), np.array([5, 6, 7, 8])

    def of_a(version: DigestVersion) -> bytes:
        return payload_hash(a, version, rows=2, columns=2)

    def of_b(version: DigestVersion, segments: Sequence[int] = ()) -> bytes:
        return payload_hash(
            b, version, rows=2, columns=3, lengths=[1, 3], prompt=b"\x08", segments=segments,
            only_train_critic=True, temperature=0.5, learning_rate=0.001,
        )  # fmt: skip

    found = [
        of_a(DigestVersion(1)), of_b(DigestVersion(1)),
        of_a(DigestVersion(2, 256)), of_a(DigestVersion(2, 65_536)), of_a(DigestVersion(2, 65_537)),
        of_b(DigestVersion(2, 257)), of_b(DigestVersion(2, 257), [0, 0, 0, 1]),
        step_digest(bytes(32), 1, 1, of_a(DigestVersion(1)), 1),
    ]  # fmt: skip
    assert [digest.hex() for digest in found] == vectors


def little_endian(kind: str, *values: float) -> bytes:
    """Values in the terms of the proto."""
    code = {"uint8": "B", "uint16": "H", "int32": "i", "int64": "q", "float64": "d"}[kind]
    return struct.pack(f"<{len(values)}{code}", *values)


@given(
    version=st.sampled_from([1, 2]),
    num_tokens=st.sampled_from([2, 255, 256, 257, 65_535, 65_536, 65_537, 2**31 - 1]),
    data=st.data(),
    lengths=st.lists(st.integers(1, 9), max_size=4),
    prompt=st.binary(max_size=5),
    segments=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    flags=st.tuples(st.booleans(), st.booleans()),
    temperature=st.none() | st.floats(0, 10),
    rate=st.none() | st.floats(0, 1),
)
def test_the_layout_is_the_one_described(
    version: int, num_tokens: int, data: st.DataObject, lengths: list[int], prompt: bytes,
    segments: list[int], flags: tuple[bool, bool], temperature: float | None, rate: float | None,
) -> None:  # fmt: skip
    ids = data.draw(st.lists(st.integers(0, num_tokens - 1), max_size=20))
    modes = flags[0] + 2 * flags[1] + 4 * (temperature is not None) + 8 * (rate is not None)
    if version == 1:
        kind, expected = "int32", b"maskwire.v1.payload\0"
    else:
        kind = "uint8" if num_tokens <= 256 else "uint16" if num_tokens <= 65_536 else "int32"
        expected = b"maskwire.v2.payload\0"
        expected += little_endian("uint8", {"uint8": 1, "uint16": 2, "int32": 4}[kind])
    expected += little_endian("int64", 3, 7)
    expected += little_endian("int64", len(lengths)) + little_endian("int32", *lengths)
    expected += little_endian("int64", len(ids)) + little_endian(kind, *ids)
    expected += little_endian("int64", len(prompt)) + prompt
    if version == 1:
        segments = []
    else:
        expected += little_endian("int64", len(segments)) + little_endian("int32", *segments)
    expected += little_endian("uint8", modes) + little_endian("float64", temperature or 0, rate or 0)
    found = payload_hash(
        np.array(ids, dtype=np.int64), DigestVersion(version, num_tokens), rows=3, columns=7, lengths=lengths,
        prompt=prompt, segments=segments, only_train_generator=flags[0], only_train_critic=flags[1],
        temperature=temperature, learning_rate=rate,
    )  # fmt: skip
    assert found == hashlib.sha256(expected).digest()


def test_version_1_refuses_segments() -> None:
    with pytest.raises(ValueError, match="segment_ids needs digest version 2, but this run has version 1"):
        payload_hash(np.array([[1, 2]]), DigestVersion(1), rows=1, columns=2, segments=[0, 1])


@pytest.mark.parametrize("version", KINDS, ids=str)
def test_the_type_that_ids_travel_in_does_not_matter(version: DigestVersion) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    hashes = {
        payload_hash(ids.astype(dtype), version, rows=2, columns=3)
        for dtype in ("u1", "<u2", ">u2", "<i4", ">i8", "<i8", "<u8", "i1")
    }
    assert len(hashes) == 1
    assert payload_hash(ids[:, ::-1][:, ::-1], version, rows=2, columns=3) in hashes
    assert payload_hash(np.asfortranarray(ids), version, rows=2, columns=3) in hashes


def test_the_versions_and_the_types_of_ids_give_different_hashes() -> None:
    ids = np.array([[1, 2], [3, 4]])
    assert len({payload_hash(ids, version, rows=2, columns=2) for version in KINDS}) == 4


@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        (DigestVersion(1), 2**31), (DigestVersion(1), -(2**31) - 1),
        (DigestVersion(2, 200), 256), (DigestVersion(2, 200), -1),
        (DigestVersion(2, 257), 65_536), (DigestVersion(2, 257), -65_536),
        (DigestVersion(2, 65_537), 2**31), (DigestVersion(2, 65_537), 2**32 + 1),
    ],
)  # fmt: skip
def test_an_id_that_would_not_survive_the_narrowing_is_refused(version: DigestVersion, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"to be hashed as {version.id_type.name}, got {wrong}"):
        payload_hash(np.array([[1, wrong]]), version, rows=1, columns=2)


def test_ids_that_have_the_type_of_the_hash_are_not_copied() -> None:
    ids = np.arange(6, dtype="<u2").reshape(2, 3)
    assert np.shares_memory(with_id_type(ids, DigestVersion(2, 257).id_type), ids)


def test_chains_differ_by_each_of_their_parts() -> None:
    start = initial_digest(b"{}", 0)
    digests = {
        start, initial_digest(b"{}", 1), initial_digest(b"{ }", 0),
        lineage_digest(start, 2), lineage_digest(start, 3),
        step_digest(start, 1, 1, b"p" * 32, 1), step_digest(start, 2, 1, b"p" * 32, 1),
        step_digest(start, 1, 2, b"p" * 32, 1), step_digest(start, 1, 1, b"q" * 32, 1),
        step_digest(start, 1, 1, b"p" * 32, 2),
    }  # fmt: skip
    assert len(digests) == 10


def test_client_and_server_agree_on_the_newest_version_that_both_compute() -> None:
    assert [newest_common(offered) for offered in ((1,), (1, 2), (2,), (1, 3), (3,), ())] == [
        1,
        2,
        2,
        1,
        0,
        0,
    ]
