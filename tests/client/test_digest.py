"""The digest against the proto's own description: its test vectors, and a second reading of its text."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maskwire.v1.digest import initial_digest, lineage_digest, payload_hash, step_digest

PROTO = Path(__file__).resolve().parents[2] / "proto" / "maskwire" / "v1" / "training_service.proto"


def test_the_vectors_written_in_the_proto() -> None:
    first, second, third = (bytes.fromhex(v) for v in re.findall(r"// ([0-9a-f]{64})", PROTO.read_text()))
    plain = payload_hash(np.array([[1, 2], [3, 4]]), rows=2, columns=2)
    assert plain == first
    assert second == payload_hash(
        np.array([5, 6, 7, 8]), rows=2, columns=3, lengths=[1, 3], prompt=b"\x08",
        only_train_critic=True, temperature=0.5, learning_rate=0.001,
    )  # fmt: skip
    assert step_digest(bytes(32), 1, 1, plain, 1) == third


@given(
    ids=st.lists(st.integers(0, 2**31 - 1), max_size=20),
    lengths=st.lists(st.integers(1, 9), max_size=4),
    prompt=st.binary(max_size=5),
    flags=st.tuples(st.booleans(), st.booleans()),
    temperature=st.none() | st.floats(0, 10),
    rate=st.none() | st.floats(0, 1),
)
def test_the_layout_is_the_one_described(
    ids: list[int], lengths: list[int], prompt: bytes, flags: tuple[bool, bool],
    temperature: float | None, rate: float | None,
) -> None:  # fmt: skip
    modes = flags[0] + 2 * flags[1] + 4 * (temperature is not None) + 8 * (rate is not None)
    expected = b"maskwire.v1.payload\0" + struct.pack("<qq", 3, 7)
    expected += struct.pack(f"<q{len(lengths)}i", len(lengths), *lengths)
    expected += struct.pack(f"<q{len(ids)}i", len(ids), *ids)
    expected += struct.pack("<q", len(prompt)) + prompt
    expected += struct.pack("<Bdd", modes, temperature or 0, rate or 0)
    found = payload_hash(
        np.array(ids, dtype=np.int64), rows=3, columns=7, lengths=lengths, prompt=prompt,
        only_train_generator=flags[0], only_train_critic=flags[1], temperature=temperature,
        learning_rate=rate,
    )  # fmt: skip
    assert found == hashlib.sha256(expected).digest()


def test_the_type_that_ids_travel_in_does_not_matter() -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    hashes = {
        payload_hash(ids.astype(dtype), rows=2, columns=3) for dtype in ("u1", "<u2", ">u2", "<i4", "<i8")
    }
    assert len(hashes) == 1
    assert payload_hash(ids[:, ::-1][:, ::-1], rows=2, columns=3) in hashes


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
