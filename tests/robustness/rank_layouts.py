"""R13: a run that four ranks saved, as two copies of the model, continues on other numbers of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rank_groups import RankServer

import maskwire

SETTINGS = (
    "objective.critic=self", "objective.self_cond=true", "optimizer.ema_decay=0.9",
    "distributed.rank_timeout_seconds=60",
)  # fmt: skip
SAVED_ON = 4
LOADED_ON = (None, 1, 2, 3, 8)
"""None: one process without a launcher."""


def other_layouts(folder: Path) -> dict[str, Any]:
    """Save on 2 x 2 ranks, and load on each other number. Raises AssertionError."""
    server = RankServer(folder / "saved", SAVED_ON, *SETTINGS, "distributed.replicate=2")
    try:
        with _connected(server) as trainer:
            for step in range(1, 6):
                trainer.train_step(_batch(step))
            expected = _seen(trainer)
            name = trainer.checkpoint("end").name
        assert server.stop() == 0
    finally:
        server.kill()
    files = {path.name for path in (server.run_dir / "checkpoints" / name).iterdir()}
    assert all(f"model-r000{rank}-001.safetensors" in files for rank in range(SAVED_ON)), files
    for ranks in LOADED_ON:
        room = folder / f"on-{ranks}"
        shutil.copytree(server.run_dir, room / "run")
        other = RankServer(room, ranks, *SETTINGS)
        try:
            with _connected(other) as trainer:
                found = _seen(trainer)
                assert found == expected, f"on {ranks} ranks: {found} instead of {expected}"
                trainer.train_step(_batch(6))
            assert other.stop() == 0
        finally:
            other.kill()
    return {"layouts": len(LOADED_ON)}


def _batch(step: int) -> Any:
    return np.random.default_rng(step).integers(0, 256, (5, 24))


def _connected(server: RankServer) -> maskwire.Trainer:
    return maskwire.connect(server.target, takeover=True, retry_for=300, on_wait=lambda _: None)


def _seen(trainer: maskwire.Trainer) -> tuple[str, float, float, list[Any]]:
    """Digest, losses of the average and of the weights, and samples."""
    averaged, raw = (trainer.eval_loss(_batch(0), raw_weights=raw).losses.loss for raw in (False, True))
    sampled = trainer.generate(count=2, length=6, seed=1).tokens.tolist()
    return trainer.digest.hex(), averaged, raw, sampled
