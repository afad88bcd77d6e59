"""A model that cannot be built ends all ranks once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rank_groups import RankServer


@pytest.mark.skipif(
    int(os.environ.get("MASKWIRE_PARITY_STEPS", "1")) < 50,
    reason="a part of `make robustness`: it starts two ranks",
)
def test_a_model_that_one_rank_cannot_build_ends_all_ranks_once_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    server = RankServer(
        tmp_path, 2, "distributed.rank_timeout_seconds=2", "model.source=python", "model.num_tokens=257",
        "model.mask_id=256", "model.python.factory=control_flow:on_one_rank",
    )  # fmt: skip
    try:
        assert server.process.wait(120) == 2
        assert server.log.read_text().count("MemoryError: none is left on this host; correct it") == 1
    finally:
        server.kill()
