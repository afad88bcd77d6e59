"""The memory report of `check` follows the options of the encoder."""

from __future__ import annotations

import re
from typing import Any

import pytest

from maskwire_server import config
from maskwire_server.training.footprint import footprint


def reported(**model: Any) -> tuple[int, int]:
    """Parameters, and numbers that a block keeps for each position."""
    whole = config.load(None, model={"dim": 64, "depth": 1, **model}, serve={"device": "cpu"})
    lines = footprint(whole.model, whole.objective, whole.optimizer, whole.serve).lines
    found = [
        re.search(pattern, "\n".join(lines)) for pattern in (r"parameters +([\d,]+)", r"x ([\d,]+) numbers")
    ]
    parameters, widths = (int(match[1].replace(",", "")) for match in found if match)
    return parameters, widths


@pytest.mark.parametrize(
    ("model", "more", "wider"),
    [
        ({"kv_heads": 1}, -2 * 3 * 64 * 64, 0),
        ({"ff_bias": False}, -(256 + 64), 0),
        ({"ff_down_bias": False}, -64, 0),
        ({"feed_forward": "geglu"}, 256 * 64 + 256, 2 * 256),
        ({"feed_forward": "relu_squared"}, 0, 0),
        ({"qk_norm": True, "qk_norm_gain": "per_head"}, 2 * 4 * 64, 0),
        ({"qk_norm": True, "qk_norm_gain": "none"}, 0, 0),
    ],
    ids=str,
)
def test_parameters_and_kept_activations_follow_the_options(
    model: dict[str, Any], more: int, wider: int
) -> None:
    parameters, widths = reported()
    assert reported(**model) == (parameters + more, widths + wider)
