"""Models that end all ranks once, with code 2, because a restart would not help (in `make robustness`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rank_groups import RankServer

import maskwire

pytestmark = pytest.mark.skipif(
    int(os.environ.get("MASKWIRE_PARITY_STEPS", "1")) < 50,
    reason="a part of `make robustness`: starts two ranks for each test",
)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RankServer]]:
    """Starts two ranks with a model of `control_flow`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    servers: list[RankServer] = []

    def made(name: str, **options: str) -> RankServer:
        server = RankServer(
            tmp_path, 2, "distributed.rank_timeout_seconds=2", "model.source=python", "model.num_tokens=257",
            "model.mask_id=256", f"model.python.factory=control_flow:{name}",
            *[f"model.python.options.{option}={value}" for option, value in options.items()],
        )  # fmt: skip
        servers.append(server)
        return server

    yield made
    for server in servers:
        server.kill()


def test_a_model_that_one_rank_cannot_build(start: Callable[..., RankServer]) -> None:
    server = start("on_one_rank")
    assert server.process.wait(120) == 2
    assert server.log.read_text().count("MemoryError: none is left on this host; correct it") == 1


def test_a_model_that_skips_a_block_on_one_rank(start: Callable[..., RankServer]) -> None:
    """The other rank waits in a collective operation at that time."""
    tokens = np.random.default_rng(1).integers(0, 256, (6, 32))
    server = start("skipping", skip="call")
    with maskwire.connect(server.target, retry_for=120, on_wait=lambda _: None) as trainer:
        assert trainer.train_step(tokens[:2, :8]).step == 1
    with (
        maskwire.connect(server.target, takeover=True, retry_for=0) as trainer,
        pytest.raises(maskwire.errors.MaskwireError),
    ):
        trainer.train_step(tokens)
    assert server.process.wait(120) == 2
    assert "maskwire-server: distributed: a pass called block 2 instead of block 1" in server.log.read_text()
