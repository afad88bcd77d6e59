"""Muon and parameter groups through a real server that is killed, and what a restart may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
from serving import ServerProcess

import maskwire

Serve = Callable[..., ServerProcess]
MUON = {
    "optimizer__name": "muon", "optimizer__warmup_steps": "3", "optimizer__learning_rate": "0.01",
    "optimizer__ema_decay": "0.9", "objective__critic": "token", "objective__self_cond": "true",
    "model__feed_forward": "swiglu", "checkpoints__every_seconds": "1e6",
}  # fmt: skip
FROZEN = '{match = "*token_emb.weight", train = false}'
FIRST = f'[{FROZEN}, {{match = "blocks.*", lr_scale = 0.5, weight_decay = 0.1}}]'
SECOND = f'[{{match = "*.to_out.weight", lr_scale = 2.0}}, {FROZEN}]'


def tokens(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 16, (4, 16))


def train(server: ServerProcess, first: int, last: int) -> None:
    with maskwire.connect(server.address) as trainer:
        assert trainer.step == first - 1
        for step in range(first, last + 1):
            trainer.train_step(tokens(step))


def state_of(server: ServerProcess, folder: Path) -> dict[str, bytes]:
    """Weights, averages and optimizer state, byte for byte."""
    with maskwire.attach(server.address) as client:
        client.download(client.checkpoint("end").name, folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_kill_changes_no_bit_of_muons_state_though_the_groups_change(serve: Serve, tmp_path: Path) -> None:
    states = []
    for name in ("calm", "rough"):
        server = serve(name, **MUON, optimizer__groups=FIRST)
        train(server, 1, 6)
        if name == "calm":
            assert server.stop() == 0  # it saves: nothing is computed again
        else:
            server.kill()
        server._command.append(f"--set=optimizer.groups={SECOND}")
        server.start()
        train(server, 7, 9)
        states.append(state_of(server, tmp_path / f"{name}-end"))
    assert "replayed 6 steps" in server.log.read_text()
    assert set(states[0]) == {
        "model.safetensors", "frozen.safetensors", "optimizer.safetensors", "ema.safetensors"}  # fmt: skip
    assert states[0] == states[1]


def test_the_optimizer_may_change_until_the_first_step(serve: Serve, tmp_path: Path) -> None:
    settings = {key: value for key, value in MUON.items() if key != "optimizer__name"}
    changed = serve("changed", **settings)
    assert changed.stop() == 0
    changed._command += ["--set=optimizer.name=muon", f"--set=optimizer.groups={FIRST}"]
    same = serve("same", **MUON, optimizer__groups=FIRST)
    changed.start()
    for server in (changed, same):
        train(server, 1, 2)
    changed.kill()
    changed.start()
    assert "replayed 2 steps" in changed.log.read_text()
    assert state_of(changed, tmp_path / "changed-end") == state_of(same, tmp_path / "same-end")


def test_what_the_state_does_not_fit_is_refused_and_nothing_is_lost(serve: Serve, tmp_path: Path) -> None:
    server = serve(**MUON, optimizer__groups=FIRST)
    train(server, 1, 3)
    assert server.stop() == 0
    for change in ("optimizer.name=adamw", "optimizer.groups=[]"):
        refused = fork_server.run([*server._command, f"--set={change}"], text=True)
        assert refused.returncode == 3, refused.stderr
        assert "optimizer.name and the parameters that optimizer.groups freezes must be as" in refused.stderr
    wrong = '--set=optimizer.groups=[{match = "blocs.*"}]'
    refused = fork_server.run([*server._command, wrong], text=True)
    assert refused.returncode == 2, refused.stderr
    assert "optimizer.groups.0.match: must match the name of a parameter" in refused.stderr
    server.start()
    train(server, 4, 4)
