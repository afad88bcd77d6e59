"""A run that several processes serve: real ranks, killed and frozen, behind a real client."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_groups import RankServer

import maskwire

Start = Callable[..., RankServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[RankServer] = []

    def made(ranks: int | None, *settings: str, fault: str = "", folder: Path | None = None) -> RankServer:
        room = folder or tmp_path / str(len(servers))
        servers.append(RankServer(room, ranks, *settings, fault=fault))
        return servers[-1]

    yield made
    for server in servers:
        server.kill()


def batch(step: int) -> Any:
    return np.random.default_rng(step).integers(0, 256, (6, 32))


def trained(server: RankServer, steps: int, after: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Losses, digest, evaluation, samples and the hash of the saved weights after some steps."""
    with maskwire.connect(server.target, retry_for=120, on_wait=lambda _: None) as trainer:
        losses = []
        for step in range(1, steps + 1):
            losses.append(trainer.train_step(batch(step)).losses.loss)
            after(step)
        evaluated = trainer.eval_loss(batch(0)).losses.loss
        sampled = trainer.generate(count=2, length=8, seed=1).tokens.tolist()
        saved = trainer.checkpoint("end")
        layout = trainer.status().versions.get("world_size")
        digest = trainer.digest.hex()
    folder = server.run_dir / "checkpoints" / saved.name
    hashes = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")
    }
    assert hashes
    return {"losses": losses, "digest": digest, "evaluated": evaluated, "sampled": sampled, "files": hashes,
            "layout": layout}  # fmt: skip


def test_one_rank_under_the_launcher_gives_the_bits_of_a_plain_server(start: Start) -> None:
    settings = ("objective.critic=self", "objective.self_cond=true", "optimizer.ema_decay=0.9")
    plain, launched = start(None, *settings), start(1, *settings)
    expected, found = trained(plain, 20), trained(launched, 20)
    assert found.pop("layout") == "1 x 1"
    assert expected.pop("layout") == "1", "a single process has no group"
    assert found == expected
    assert launched.stop() == 0
    assert plain.stop() == 0


def test_a_killed_rank_costs_a_restart_and_no_step(start: Start) -> None:
    undisturbed, killed = start(2), start(2)
    expected = trained(undisturbed, 12)

    def kill(step: int) -> None:
        if step in (4, 8):
            killed.ranks()[step // 4 - 1].kill()  # the leader, then its follower

    assert trained(killed, 12, kill) == expected
    assert expected["layout"] == "1 x 2"
    with maskwire.attach(killed.target) as client:
        assert client.status().last_error == "rank 1 ended"
    log = killed.log.read_text()
    assert "rank 1 ended: all ranks restart" in log
    assert "the leader ended: all ranks restart" in log
    assert killed.stop() == 0
    assert not killed.ranks()
    with maskwire.connect(undisturbed.target, takeover=True, on_wait=lambda _: None) as trainer:
        trainer.train_step(batch(13))
    undisturbed.kill()
    alone = start(None, folder=undisturbed.folder)  # another layout must not compute that step again
    assert alone.process.wait(120) == 3
    assert "fingerprint.world_size was '1 x 2'" in alone.log.read_text()
    written = [path.read_bytes()[:2] for path in killed.run_dir.rglob("*") if path.is_file()]
    assert not [start for start in written if start in (b"PK", b"\x80\x02", b"\x80\x04")], "a pickle"


def test_unusual_requests_hold_nothing_up(start: Start) -> None:
    """A rank without memory, one that freezes, one row, prompts alone, a generation that is left."""
    server = start(
        2, "objective.self_cond=true", "distributed.rank_timeout_seconds=2", fault="1:rank.ordered:6:memory"
    )
    with maskwire.connect(server.target, retry_for=120, on_wait=lambda _: None) as trainer:
        assert trainer.train_step(batch(1)[:1]).step == 1
        with pytest.raises(maskwire.errors.MaskwireError, match="leave at least one to predict"):
            trainer.train_step(batch(2), prompt_mask=np.ones((6, 32), dtype=bool))
        assert trainer.train_step(batch(2)).step == 2
        for state in trainer.generate_steps(count=3, length=12, seed=1):
            assert not state.done
            break
        with pytest.raises(maskwire.errors.MaskwireError):
            trainer.train_step(np.full((2, 8), 256))
        for step in range(3, 7):
            assert trainer.train_step(batch(step)).step == step
        assert server.fired.exists()
        server.ranks()[1].send_signal(signal.SIGSTOP)
        assert trainer.train_step(batch(7)).step == 7
    assert "rank 1 failed in" in server.log.read_text()
    assert "rank 1 was silent for 2 s" in server.log.read_text()
    assert server.stop() == 0


def test_a_server_that_is_stopped_while_it_starts_ends_with_0(start: Start) -> None:
    server = start(2)
    while not server.ranks():
        assert server.process.poll() is None
    assert server.stop() == 0
    assert "listening on" not in server.log.read_text()


def test_ranks_that_do_not_form_the_layout_are_refused_once(start: Start) -> None:
    server = start(2, "distributed.replicate=3")
    assert server.process.wait(120) == 2
    log = server.log.read_text()
    assert "distributed: replicate x shard must be the number of ranks, 2, got 3 x off" in log
