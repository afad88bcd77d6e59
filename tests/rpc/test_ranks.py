"""A run that several processes serve: real ranks, killed and frozen, behind a real client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
from rank_groups import RankServer

import maskwire
import maskwire_server
from maskwire_server.recovery.verify import verify
from maskwire_server.weight_import_export import export

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


def test_one_rank_under_the_launcher_gives_the_bits_of_a_plain_server(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    settings = ("objective.critic=self", "objective.self_cond=true", "optimizer.ema_decay=0.9")
    plain, launched = start(None, *settings), start(1, *settings)
    expected, found = trained(plain, 50), trained(launched, 50)
    assert found.pop("layout") == "1 x 1"
    assert expected.pop("layout") == "1", "a single process has no group"
    assert found == expected
    assert launched.stop() == 0
    assert plain.stop() == 0
    left = {path.name for path in temporary.iterdir()}
    assert not {name for name in left if not name.startswith("torchinductor_")}, "all but a cache is deleted"


SETTINGS = ("objective.self_cond=true", "distributed.rank_timeout_seconds=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RankServer, dict[str, Any]]]:
    """Two ranks that nothing happens to, and what they gave in 12 steps; the leader gathers what it saves."""
    server = RankServer(tmp_path_factory.mktemp("ranks"), 2, *SETTINGS, "distributed.checkpoints_by=leader")
    try:
        yield server, trained(server, 12)
        assert server.stop() == 0
        assert not server.ranks()
    finally:
        server.kill()


def test_a_lost_rank_costs_a_restart_and_no_step(
    start: Start, undisturbed: tuple[RankServer, dict[str, Any]], tmp_path: Path
) -> None:
    """A follower runs out of memory, the leader is killed, the follower freezes. R12 also kills followers."""
    lossy = start(2, *SETTINGS, fault="1:rank.ordered:6:memory")

    def lose(step: int) -> None:
        if step == 4:
            lossy.ranks()[0].kill()
        if step == 10:
            lossy.ranks()[1].send_signal(signal.SIGSTOP)

    expected, found = dict(undisturbed[1]), trained(lossy, 12, lose)
    assert set(expected.pop("files")) == {"model.safetensors", "optimizer.safetensors"}
    assert {name: value for name, value in found.items() if name != "files"} == expected
    assert expected["layout"] == "1 x 2"
    with maskwire.attach(lossy.target) as client:
        assert client.status().last_error == "rank 1 was silent for 2 s"
    log = lossy.log.read_text()
    assert lossy.fired.exists()
    assert "rank 1 failed in" in log
    assert re.search(r"the leader (ended|was killed by signal 9 .*): all ranks restart", log)
    assert lossy.stop() == 0
    pickles = [
        path
        for path in lossy.run_dir.rglob("*")
        if path.is_file()
        and path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ]
    assert not pickles
    gathered = maskwire_server.load(undisturbed[0].run_dir / "checkpoints" / "end").state_dict()
    for name, tensor in maskwire_server.load(lossy.run_dir / "checkpoints" / "end").state_dict().items():
        assert torch.equal(gathered[name], tensor), name
    check_on_one_process(start, lossy, found, tmp_path)


def check_on_one_process(start: Start, ranks: RankServer, expected: dict[str, Any], room: Path) -> None:
    """What two ranks saved is loaded, evaluated, verified, downloaded and exported by one process."""
    folder = ranks.run_dir / "checkpoints" / "end"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["manifest.json", *sorted(expected["files"])]
    assert {"model-r0000-001.safetensors", "optimizer-r0001-001.safetensors"} <= set(files)
    alone = start(None, folder=ranks.folder)
    with maskwire.connect(alone.target, takeover=True, retry_for=120, on_wait=lambda _: None) as trainer:
        assert trainer.digest.hex() == expected["digest"]
        assert trainer.eval_loss(batch(0)).losses.loss == expected["evaluated"]
        trainer.download("end", room / "weights", weights=True)
        trainer.download("end", room / "all")
    assert alone.stop() == 0
    audit = verify(ranks.run_dir)
    assert not audit.problems
    assert "end" in audit.checkpoints
    assert export(ranks.run_dir, "end", room / "joined", to="maskwire", weights="auto") == 0
    assert sorted(path.name for path in (room / "joined").iterdir()) == ["manifest.json", "model.safetensors"]
    assert sorted(path.name for path in (room / "all").iterdir()) == files
    weights = [maskwire_server.load(room / each).state_dict() for each in ("weights", "all", "joined")]
    for name, tensor in maskwire_server.load(folder).state_dict().items():
        assert all(torch.equal(each[name], tensor) for each in weights), name
    shutil.copy(folder / "model-r0000-001.safetensors", folder / "model-r0002-001.safetensors")
    found = verify(ranks.run_dir).problems
    assert [problem.split(" is ")[0] for problem in found] == ["checkpoint end: model-r0002-001.safetensors:"]
    shutil.copy(folder / "model-r0000-001.safetensors", room / "weights" / "model-r0002-001.safetensors")
    with pytest.raises(ValueError, match=r"model-r0002-001.safetensors is not listed in manifest.json"):
        maskwire_server.load(room / "weights")
    (room / "all" / "model-r0001-001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"all has no model-r0001-001.safetensors; download it"):
        maskwire_server.load(room / "all")


def test_unusual_requests_hold_nothing_up(
    start: Start, undisturbed: tuple[RankServer, dict[str, Any]], tmp_path: Path
) -> None:
    """One row, prompts alone, a generation that is left, ids that the model does not have."""
    with maskwire.connect(
        undisturbed[0].target, takeover=True, retry_for=120, on_wait=lambda _: None
    ) as trainer:
        step = trainer.step
        assert trainer.train_step(batch(1)[:1]).step == step + 1
        with pytest.raises(maskwire.errors.MaskwireError, match="leave at least one to predict"):
            trainer.train_step(batch(2), prompt_mask=np.ones((6, 32), dtype=bool))
        assert trainer.train_step(batch(2)).step == step + 2
        for state in trainer.generate_steps(count=3, length=12, seed=1):
            assert not state.done
            break
        with pytest.raises(maskwire.errors.MaskwireError):
            trainer.train_step(np.full((2, 8), 256))
        assert trainer.train_step(batch(3)).step == step + 3
        # As after a kill: steps behind the newest checkpoint, which another layout must not compute again.
        shutil.copytree(undisturbed[0].run_dir, tmp_path / "copy" / "run")
    alone = start(None, folder=tmp_path / "copy")
    assert alone.process.wait(120) == 3
    assert "fingerprint.world_size was '1 x 2'" in alone.log.read_text()


def test_a_server_that_is_stopped_while_it_starts_ends_with_0(start: Start) -> None:
    server = start(1)
    while not server.ranks():
        assert server.process.poll() is None
    assert server.stop() == 0
    assert "listening on" not in server.log.read_text()


LAYOUT = "distributed: replicate x shard must be the number of ranks, 2, got 3 x off"


def test_ranks_that_do_not_form_the_layout_are_refused_in_the_log_before_any_starts(start: Start) -> None:
    server = start(2, "distributed.replicate=3", "telemetry.log_format=json")
    assert server.process.wait(120) == 2
    (line,) = map(json.loads, server.log.read_text().splitlines())
    assert (line["level"], line["message"]) == ("critical", LAYOUT)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--nodes=2", "--nodes needs --ranks, got none"),
        ("--rendezvous=host:29500", "--rendezvous needs --ranks, got none"),
        ("--ranks=2 --rendezvous=host:29500", "--rendezvous needs --nodes, the number of hosts, got only "
         "host:29500"),
        ("--ranks=2 --set=distributed.rank_timeout_seconds=1", "distributed.rank_timeout_seconds: must be "
         "greater than or equal to 2, got '1'"),
        ("--set=distributed.replicate=2", "distributed: replicate and shard divide ranks, and need --ranks, "
         "got 2 x off without it"),
        ("--set=distributed.shard=4", "distributed: replicate and shard divide ranks, and need --ranks, "
         "got 1 x 4 without it"),
    ],
)  # fmt: skip
def test_flags_and_settings_that_do_not_go_together_are_refused(
    given: str, expected: str, tmp_path: Path
) -> None:
    done = fork_server.run(
        ["-m", "maskwire_server", "serve", f"--run-dir={tmp_path / 'run'}", *given.split()], text=True
    )
    assert (done.returncode, done.stderr) == (2, f"maskwire-server: {expected}\n")
    assert not (tmp_path / "run").exists()


ONE = "distributed.replicate=1"
DIFFERENCES = {
    "the layout of no rank": (["distributed.replicate=3"] * 2, LAYOUT),
    "two layouts": (
        [ONE, "distributed.replicate=2"],
        "distributed.replicate: must be the same on all ranks, got 1 on rank 0 (HOST) and 2 on rank 1 (HOST)",
    ),
    "no GPU": (
        [ONE, "serve.device=cuda"],
        "rank 1 on HOST: serve.device: must be a device of this machine, which has 0 CUDA devices, got "
        "'cuda'; use auto or cpu",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_that_do_not_fit_together_all_say_why(difference: str, tmp_path: Path) -> None:
    """Ranks of another launcher, such as torchrun: ours checks the layout of one host before it starts."""
    settings, expected = DIFFERENCES[difference]
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        fork_server.Process(
            ["-m", "maskwire_server", "serve", f"--run-dir={tmp_path}", f"--set={setting}"],
            env={**os.environ, **fork_server.ONE_THREAD, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank, setting in enumerate(settings)
    ]  # fmt: skip
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    for each in said:
        assert f"maskwire-server: {expected.replace('HOST', socket.gethostname())}\n" in each
