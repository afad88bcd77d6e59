"""Requests become the engine's values in one canonical form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maskwire.protocol.codec import eval_request, hash_of, step_request
from maskwire.v1.digest import DigestVersion
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.batch import Payload
from maskwire_server.errors import Refused
from maskwire_server.rpc import decoding

INFO = ModelInfo(17, 16, None, 32, 0, "lm_diffusion", True, True, False)
LIMITS = Limits(10**6, 10**6, 8, 64, 64, 10**6)
TOKENS = np.array([[1, 2], [3, 4]])


@pytest.mark.parametrize("version", [DigestVersion(1), DigestVersion(2, 17)])
def test_a_negative_zero_is_zero_in_the_digest_of_both_sides_in_training_and_in_the_journal(
    version: DigestVersion,
) -> None:
    negative, zero = (
        step_request("id", TOKENS, generator_sample_temperature=value, learning_rate=value)
        for value in (-0.0, 0.0)
    )
    payload = decoding.read_step(negative, INFO, LIMITS).payload
    modes = payload.modes
    assert modes.generator_sample_temperature is not None
    assert modes.learning_rate is not None
    assert math.copysign(1, modes.generator_sample_temperature) == math.copysign(1, modes.learning_rate) == 1
    assert payload.hash(version) == hash_of(negative, version) == hash_of(zero, version)
    assert Payload.decode(payload.encode()).hash(version) == payload.hash(version)


def test_a_negative_zero_is_zero_in_an_evaluation() -> None:
    request = eval_request(TOKENS, generator_sample_temperature=-0.0)
    temperature = decoding.read_eval(request, INFO, LIMITS).options.generator_sample_temperature
    assert temperature is not None
    assert math.copysign(1, temperature) == 1


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "9" + "-" * 62 + "_"])
def test_a_checkpoint_name_of_up_to_64_characters_is_accepted(name: str) -> None:
    assert decoding.read_checkpoint_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a" * 65, "A", "-a", "_a", "a.b", "a/b", "a b", "a\n", "ä", "..", "a" * 64 + "\n"]
)
def test_a_checkpoint_name_that_is_longer_or_has_other_characters_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="name must have 1 to 64 lower-case letters") as raised:
        decoding.read_checkpoint_name(name)
    assert (raised.value.reason, list(raised.value.fields)) == ("INVALID_FIELD", ["name"])
