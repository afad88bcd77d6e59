"""R12: a rank is killed at failpoints, at random instants, or hangs; the run ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from rank_groups import RankServer

import maskwire
from maskwire_server.failpoints import NAMES, RANK_NAMES, SHARD_NAMES

SIZE = 2
SETTINGS = (
    "checkpoints.every_steps=3", "checkpoints.keep_last=2", "objective.critic=self",
    "objective.self_cond=true", "optimizer.ema_decay=0.9",
)  # fmt: skip
STEPS = 9
RESTORED = 6
"""The step to which the run is restored after the last one."""
RESTART_SECONDS = 60.0
"""How long a restart may take at most. It takes 5 to 8 s on an idle machine."""
PLACES = {0: (*NAMES, *RANK_NAMES, *SHARD_NAMES[1:]), 1: (*RANK_NAMES[1:], *SHARD_NAMES[:4])}
"""The failpoints that each rank passes."""
ONCE = (
    "journal.creat", "journal.tid", "session.", "checkpoint.collect", "checkpoint.undone", "restore.",
    "recovery.", "drain.",
)  # fmt: skip
"""The beginnings of those that may be passed only once."""
Hook = Callable[[int, "Future[maskwire.StepResult]"], None]
"""Called with the number of a step that was sent, and what waits for its result."""


def batch(step: int) -> Any:
    """The ids of a step, int64 [5, 24]: fewer rows for one rank than for the other."""
    return np.random.default_rng(step).integers(0, 256, (5, 24))


def at_failpoints(folder: Path, rank: int, places: list[str]) -> dict[str, Any]:
    """One server for each place, whose rank is killed there: each place is reached. Raises AssertionError."""
    expected = outcome(folder / "undisturbed")
    for place in places:
        settings = list(SETTINGS)
        if place.startswith("journal.tid"):  # otherwise the log is merged when it has 16 MiB
            settings.append("serve.durability=off")
        count = 1 if place.startswith(ONCE) else 3
        server = RankServer(folder / place, SIZE, *settings, fault=f"{rank}:{place}:{count}:kill")

        def kill_the_leader(step: int, pending: Future[Any], server: RankServer = server) -> None:
            if step == 5:
                pending.result()
                server.ranks()[0].kill()

        try:
            # For the places of a recovery, there must be something to recover.
            found = work(server, *[kill_the_leader] * place.startswith("recovery."))
            code = server.stop()
        finally:
            server.kill()
        assert found == expected, f"rank {rank} killed at {place}: {found} instead of {expected}"
        assert code == 0, f"rank {rank} killed at {place}: the server ended with {code}"
        assert server.fired.exists(), f"rank {rank} never came to {place}"
    return {"rank": rank, "places": len(places), "reached": len(places)}


def outcome(folder: Path) -> dict[str, Any]:
    """What a client finds after the work of a server that nothing happens to."""
    server = RankServer(folder, SIZE, *SETTINGS)
    try:
        found = work(server)
        assert server.stop() == 0
        return found
    finally:
        server.kill()


def work(server: RankServer, after_sending: Hook = lambda *_: None) -> dict[str, Any]:
    """Steps, saves, a restore, more steps, an evaluation and samples."""
    losses = []
    with maskwire.connect(server.target, name="job", retry_for=120, on_wait=lambda _: None) as trainer:
        assert trainer.step == 0
        for step in range(1, STEPS + 1):
            pending = trainer.submit(batch(step))
            after_sending(step, pending)
            losses.append(pending.result().loss)
            if step == RESTORED:
                trainer.checkpoint("middle")
        trainer.restore("middle")
        for step in range(RESTORED + 1, STEPS + 1):
            result = trainer.train_step(batch(2 * step))
            assert result.step == step
            losses.append(result.loss)
        digest = trainer.digest.hex()
        evaluated = trainer.eval_loss(batch(0)).losses.loss
        sampled = trainer.generate(count=2, length=6, seed=1).tokens.tolist()
        name = trainer.checkpoint("end").name
    return {
        "losses": losses, "digest": digest, "evaluated": evaluated, "sampled": sampled,
        "files": files(server, name),
    }  # fmt: skip


def files(server: RankServer, name: str) -> dict[str, str]:
    """The hashes of a checkpoint's tensors."""
    folder = server.run_dir / "checkpoints" / name
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def at_random(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kill a random rank at random instants while steps are in flight: as many restarts in a row.

    Each kill costs exactly one restart, so no restart fails. Raises AssertionError.
    """
    steps = 3 * kills
    hashes = []
    waits: list[float] = []
    restarts = 0
    for disturbed in (False, True):
        server = RankServer(folder / str(disturbed), SIZE, *SETTINGS)
        draw = random.Random(seed)
        try:
            with maskwire.connect(
                server.target, name="job", retry_for=120, on_wait=lambda _: None
            ) as trainer:
                for step in range(1, steps + 1):
                    kills_now = disturbed and step % 3 == 2
                    ranks = server.ranks() if kills_now else {}
                    began = time.monotonic()
                    pending = trainer.submit(batch(step))
                    if kills_now:
                        time.sleep(draw.random() * waits[-1])
                        draw.choice([ranks[rank] for rank in range(SIZE)]).kill()
                    pending.result()
                    waits.append(time.monotonic() - began)  # the step after a kill may be the one that waits
                name = trainer.checkpoint("end").name
                hashes.append((trainer.digest.hex(), files(server, name)))
                restarts = server.restarts()
            assert server.stop() == 0
        finally:
            server.kill()
    assert hashes[0] == hashes[1]
    assert restarts == kills, f"{kills} kills, {restarts} restarts"
    assert max(waits) <= RESTART_SECONDS, f"back after {max(waits):.0f} s"
    return {"kills": kills, "restarts": restarts, "slowest": max(waits)}


def hung_follower(folder: Path) -> dict[str, Any]:
    """A follower never carries out a step: the leader's watchdog ends the group. Raises AssertionError."""
    expected = outcome(folder / "undisturbed")
    settings = (*SETTINGS, "serve.step_timeout_seconds=3")
    server = RankServer(folder / "hung", SIZE, *settings, fault="1:rank.ordered:8:hang")
    try:
        found = work(server)
        code = server.stop()
    finally:
        server.kill()
    log = server.log.read_text()
    assert server.fired.exists()
    assert found == expected, f"{found} instead of {expected}"
    assert code == 0, f"the server ended with {code}"
    assert log.count("has made no progress for 3 s: the server exits with code 71") == 1, log[-4000:]
    return {"hangs": 1}


def frozen_start(folder: Path) -> dict[str, Any]:
    """A rank freezes while it imports torch, before anything watches it. Raises AssertionError."""
    server = RankServer(folder / "frozen", SIZE, *SETTINGS)
    try:
        while len(ranks := server.ranks()) < SIZE:
            assert server.process.poll() is None, server.log.read_text()[-4000:]
        ranks[1].suspend()
        began = time.monotonic()
        with maskwire.connect(server.target, retry_for=300, on_wait=lambda _: None) as trainer:
            assert trainer.train_step(batch(1)).step == 1
        back = time.monotonic() - began
        assert "the ranks did not meet within 60 s" in server.log.read_text()
        assert server.stop() == 0
    finally:
        server.kill()
    return {"back": back}


def stopped_hosts(folder: Path) -> dict[str, Any]:
    """SIGTERM to the launchers of two hosts, as a cluster sends it: both end in order.

    Needs root and iproute2. Raises AssertionError.
    """
    with Hosts() as hosts, contextlib.ExitStack() as ends:
        servers = [_on(hosts, name, folder, ends) for name in ("a", "b")]
        with maskwire.connect(servers[0].target, retry_for=180, on_wait=lambda _: None) as trainer:
            trainer.train_step(batch(1))
        began = time.monotonic()
        for server in reversed(servers):
            server.process.terminate()
        assert [server.process.wait(60) for server in servers] == [0, 0]
        assert "stopped" in servers[0].log.read_text(), "the leader has drained"
    return {"seconds": time.monotonic() - began}


def different_hosts(folder: Path) -> dict[str, Any]:
    """Two hosts that were configured differently: both say so and end with code 2.

    Needs root and iproute2. Raises AssertionError.
    """
    with Hosts() as hosts, contextlib.ExitStack() as ends:
        servers = [
            _on(hosts, "a", folder, ends),
            _on(hosts, "b", folder, ends, "distributed.replicate=2"),
        ]
        for server in servers:
            assert server.process.wait(180) == 2, server.log.read_text()[-2000:]
            assert "distributed.replicate: must be the same on all ranks" in server.log.read_text()
    return {}


def _on(hosts: Hosts, name: str, folder: Path, ends: contextlib.ExitStack, *settings: str) -> RankServer:
    """One rank of a server on two hosts, of which a has the run directory."""
    server = RankServer(folder / name, 1, *SETTINGS, *settings, prefix=hosts.command(name),
                        flags=["--nodes=2", f"--rendezvous={hosts.address('a')}:29400"])  # fmt: skip
    ends.callback(server.kill)
    return server


def cut_network(folder: Path) -> dict[str, Any]:
    """Two network namespaces are two hosts; the link between them goes down and comes up again.

    Needs root and iproute2. Raises AssertionError.
    """
    folder.mkdir(parents=True)
    with Hosts() as hosts, contextlib.ExitStack() as ends:
        servers = [_on(hosts, name, folder, ends) for name in ("a", "b")]
        leader = servers[0]
        with maskwire.connect(
            leader.target, name="job", retry_for=180, timeout=60, on_wait=lambda _: None
        ) as trainer:
            for step in range(1, 6):
                trainer.train_step(batch(step))
            began = time.monotonic()
            hosts.link("down")
            pending = trainer.submit(batch(6))
            while "was silent for" not in leader.log.read_text():
                assert time.monotonic() - began < 60, "the leader noticed nothing"
                time.sleep(0.1)
            noticed = time.monotonic() - began
            hosts.link("up")
            assert pending.result().step == 6
            back = time.monotonic() - began - noticed
        assert leader.stop() == 0
        assert servers[1].process.wait(60) == 0, "the other host's launcher"
        assert noticed <= 15, f"noticed after {noticed:.0f} s"
    return {"noticed": noticed, "back": back}


def hidden_folder(folder: Path) -> dict[str, Any]:
    """Two hosts, of which one does not see the other's run directory: the leader saves, unless ranks must.

    Needs root, iproute2 and unshare. Raises AssertionError.
    """
    found = {}
    for saved_by in ("auto", "ranks"):
        room = folder / saved_by
        (room / "a" / "run").mkdir(parents=True)
        hide = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {room / "a"}; exec "$@"', "sh"]
        with Hosts() as hosts, contextlib.ExitStack() as ends:
            servers = [
                RankServer(room / name, 1, *SETTINGS, f"distributed.checkpoints_by={saved_by}",
                           prefix=[*hosts.command(name), *(hide if name == "b" else [])],
                           flags=["--nodes=2", f"--rendezvous={hosts.address('a')}:29400"])
                for name in ("a", "b")
            ]  # fmt: skip
            for server in servers:
                ends.callback(server.kill)
            leader = servers[0]
            if saved_by == "ranks":
                assert leader.process.wait(180) == 2, leader.log.read_text()[-2000:]
                assert "is not the same folder on rank" in leader.log.read_text()
                continue
            with maskwire.connect(leader.target, retry_for=180, on_wait=lambda _: None) as trainer:
                trainer.train_step(batch(1))
                found = {"files": len(trainer.checkpoint("end").files)}
            assert set(files(leader, "end")) == {
                "model.safetensors", "ema.safetensors", "optimizer.safetensors",
            }  # fmt: skip
            assert "is not the same folder on rank" in leader.log.read_text()
            assert leader.stop() == 0
    return found


class Hosts:
    """Two network namespaces, a and b, joined by a pair of virtual interfaces."""

    def __init__(self) -> None:
        self._name = f"mw{os.getpid()}"

    def __enter__(self) -> Hosts:
        for name in "ab":
            self._ip(f"netns add {self._name}{name}")
        self._ip(f"link add va netns {self._name}a type veth peer name vb netns {self._name}b")
        for name in "ab":
            self._ip(f"-n {self._name}{name} addr add {self.address(name)}/24 dev v{name}")
            for interface in ("lo", f"v{name}"):
                self._ip(f"-n {self._name}{name} link set {interface} up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in "ab":
            subprocess.run(["ip", "netns", "del", f"{self._name}{name}"], check=False)

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"10.97.0.{'ab'.index(name) + 1}"

    def command(self, name: str) -> list[str]:
        """What runs a command on a host."""
        return ["ip", "netns", "exec", f"{self._name}{name}"]

    def link(self, state: str) -> None:
        """Take the link down, or up."""
        self._ip(f"-n {self._name}a link set va {state}")

    def _ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)
