"""The demo's yardstick: a 4-gram model of bytes."""

from __future__ import annotations

import math

import pytest

from demo.fourgram import FourGram


def test_probabilities_are_those_computed_by_hand() -> None:
    model = FourGram([b"aab"])
    # Behind nothing: a twice, b once, N = 3, T = 2 kinds. Behind a: a and b once each, N = 2, T = 2.
    a = (2 + 2 / 256) / (3 + 2)
    assert model.probability(b"", ord("a")) == pytest.approx(a)
    assert model.probability(b"a", ord("a")) == pytest.approx((1 + 2 * a) / (2 + 2))
    assert model.bits_per_byte([b"aa"]) == pytest.approx(-(math.log2(a) + math.log2((1 + 2 * a) / 4)) / 2)


@pytest.mark.parametrize("history", [b"", b"a", b"bra", b"zzz", b"rab"])
def test_probabilities_add_up_to_one(history: bytes) -> None:
    model = FourGram([b"abracadabra" * 3, b"", b"\x00\xff"])
    assert sum(model.probability(history, byte) for byte in range(256)) == pytest.approx(1)


def test_text_that_resembles_the_text_needs_fewer_bits() -> None:
    model = FourGram([b"the cat sat on the mat. " * 50])
    assert model.bits_per_byte([b"the mat sat on"]) < 2
    assert model.bits_per_byte([bytes(range(100, 200))]) > 8
