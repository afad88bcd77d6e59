"""R14: machines lost, faults of the object store, two servers at one address.

The store is a real S3 server in a process of its own. What was acknowledged is compared with the batches
alone, so that a step that is lost, doubled or out of order shows in the digest. One more step's loss tells
whether the weights are those of the history.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from robustness.expected import Expected, batch
from robustness.object_store import BUCKET, ObjectStoreServer, Proxy, environment
from robustness.processes import Server, preload

import maskwire
from maskwire.errors import MaskwireError

FENCED = 9
SETTINGS = {
    "checkpoints__every_steps": "7", "checkpoints__keep_last": "2", "serve__gap_seconds": "1",
    "storage__segment_seconds": "0.2",
}  # fmt: skip


@contextlib.contextmanager
def store(seed: int = 0) -> Iterator[Proxy]:
    """An S3 server, and the proxy in front of it."""
    preload("s3fs")
    with ObjectStoreServer() as server, Proxy(server.port, seed) as proxy:
        yield proxy


def server_at(folder: Path, proxy: Proxy, prefix: str, acknowledge: str, **more: Any) -> Server:
    """A server whose mirror is behind the proxy."""
    return Server(
        folder,
        environment=environment(proxy.endpoint),
        storage__mirror=f"s3://{BUCKET}/{prefix}",
        storage__acknowledge=acknowledge,
        **SETTINGS,
        **more,
    )


def start(server: Server) -> None:
    """Start a server, however long the store keeps it waiting."""
    server.spawn()
    assert server.ready(300), server.tail()


def _quiet(_: str) -> None:
    pass


def _batch(seed: int, step: int) -> np.ndarray[Any, Any]:
    return batch(seed, step)


class Job:
    """A client that trains until its server is gone, and what it was answered."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.acknowledged: dict[int, bytes] = {}
        self.mirrored = 0
        """The newest step that the server said was in the mirror."""
        self.saved: list[str] = []

    def train(self, address: str, until: int | None = None, *, retry_for: float = 0.2) -> None:
        """Train from where the server is; ends when the server does."""
        with (
            contextlib.suppress(MaskwireError, RuntimeError),  # that of a pool which is closed meanwhile
            maskwire.connect(
                address, name="job", takeover=True, window=4, retry_for=retry_for, timeout=20, on_wait=_quiet
            ) as trainer,
        ):
            in_flight: list[Any] = []
            for step in itertools.count(trainer.step + 1):
                if until is not None and step > until:
                    break
                in_flight.append(trainer.submit(_batch(self.seed, step)))
                if len(in_flight) == 4:
                    self._answered(in_flight.pop(0).result(60))
                if step % 5 == 0:
                    with maskwire.attach(address, retry_for=retry_for, timeout=20, on_wait=_quiet) as other:
                        found = other.status().mirror
                        self.mirrored = max(self.mirrored, found.step if found else 0)
                if step % 11 == 0:
                    self.saved.append(trainer.checkpoint(f"saved-{step}-{len(self.saved)}").name)
            for each in in_flight:
                self._answered(each.result(60))

    def train_while_alive(self, server: Server) -> None:
        """Train, and again if the server refuses for too long, until it ends."""
        while server.alive:
            self.train(server.address)

    def _answered(self, answer: Any) -> None:
        self.acknowledged[answer.step] = answer.digest

    @property
    def last(self) -> int:
        return max(self.acknowledged, default=0)


def expected_at(address: str, seed: int) -> Expected:
    """What the run that is served must be: its digest at its step is that of the batches alone."""
    with maskwire.attach(address, retry_for=60, on_wait=_quiet) as client:
        status = client.status()
        start = next(iter(_initial(client)))
    expected = Expected(start)
    for step in range(1, status.durable_step + 1):
        expected.train(_batch(seed, step))
    assert status.digest == expected.digest, f"another history at step {status.durable_step}"
    return expected


def _initial(client: Any) -> list[bytes]:
    digests = [info.digest for info in client.checkpoints() if info.step == 0]
    if digests:
        return digests
    from maskwire.v1.digest import initial_digest
    from maskwire_server import config

    model = {"num_tokens": 257, "mask_id": 256, "max_seq_len": 64}
    return [initial_digest(config.load(None, model=model).canonical(), 0)]


def one_more(address: str, expected: Expected, seed: int) -> None:
    """Train one more step: its loss tells whether the weights are those of the history."""
    with maskwire.connect(address, name="job", takeover=True, retry_for=60, on_wait=_quiet) as trainer:
        assert trainer.step == expected.step
        ids = _batch(seed, expected.step + 1)
        answer = trainer.train_step(ids)
    expected.train(ids)
    assert answer.loss == expected.losses[expected.step], "other weights than those of the history"
    assert answer.digest == expected.digest


def lose_machines(folder: Path, acknowledge: str, instants: int, seed: int = 0) -> dict[str, Any]:
    """Kill the server at random instants, delete its directory, and start it from the address alone."""
    draw = random.Random(f"{acknowledge} {seed}")
    lost: list[int] = []
    with store(seed) as proxy:
        server = server_at(folder / "s", proxy, f"{acknowledge}-{seed}", acknowledge, seconds=0.002)
        with server:
            job = Job(seed)
            start(server)
            for _ in range(instants):
                thread = threading.Thread(target=job.train, args=(server.address,))
                thread.start()
                time.sleep(0.05 + draw.random() * 1.2)
                server.kill()
                thread.join()
                shutil.rmtree(server.run_dir)
                start(server)
                expected = expected_at(server.address, seed)
                for step, digest in job.acknowledged.items():
                    if step <= expected.step:
                        assert expected.digests[1, step] == digest
                lost.append(max(0, job.last - expected.step))
                if acknowledge == "mirrored":
                    assert not lost[-1], f"{lost[-1]} acknowledged steps are lost"
                    with maskwire.attach(server.address) as client:
                        there = [info.name for info in client.checkpoints()]
                    assert not set(job.saved) - set(there), "an acknowledged checkpoint is lost"
                assert expected.step >= job.mirrored, "more than the last segment is lost"
                with maskwire.attach(server.address) as client:
                    mirror = client.status().mirror
                assert mirror is not None
                assert mirror.restored.startswith(f"step {expected.step} "), mirror.restored
                one_more(server.address, expected, seed)
                job.acknowledged = {expected.step: expected.digest}
                job.mirrored = min(job.mirrored, expected.step)
    return {"instants": instants, "steps": expected.step, "lost": lost}


def inject(folder: Path, acknowledge: str, faults: int, seed: int = 0) -> dict[str, Any]:
    """Train while requests to the store fail in every way; sometimes a kill; then lose the machine."""
    draw = random.Random(f"faults {acknowledge} {seed}")
    with store(seed) as proxy:
        server = server_at(folder / "s", proxy, f"faults-{acknowledge}-{seed}", acknowledge, seconds=0.002)
        with server:
            job = Job(seed)
            start(server)
            expected_at(server.address, seed)
            proxy.share = 0.2
            kills = 0
            while sum(proxy.done.values()) < faults:
                thread = threading.Thread(target=job.train, args=(server.address,))
                thread.start()
                time.sleep(0.5 + 2 * draw.random())
                server.kill()
                thread.join()
                kills += 1
                if draw.random() < 0.3 and acknowledge == "mirrored":
                    shutil.rmtree(server.run_dir)
                start(server)
                expected = expected_at(server.address, seed)
                assert expected.step >= job.last, "an acknowledged step is lost"
                for step, digest in job.acknowledged.items():
                    assert expected.digests[1, step] == digest, "another history than the client's"
            proxy.share = 0.0
            one_more(server.address, expected, seed)
            assert server.terminate() == 0, server.tail()
            shutil.rmtree(server.run_dir)
            start(server)
            assert expected_at(server.address, seed).step == expected.step, "a clean stop uploads the rest"
            one_more(server.address, expected, seed)
    return {"faults": dict(proxy.done), "kills": kills, "steps": expected.step}


def at_failpoints(folder: Path, places: list[str], times: int) -> dict[str, int]:
    """Kill or delay the server at places of the mirror; start it from its directory or the address."""
    reached = runs = 0
    with store() as proxy:
        for place, kind, number in itertools.product(places, ("kill", "eio", "delay"), range(times)):
            draw = random.Random(f"{place} {kind} {number}")
            acknowledge = draw.choice(["local", "mirrored"])
            room = folder / f"{place}-{kind}-{number}"
            prefix = f"{place}-{kind}-{number}"
            restoring = place in ("mirror.restoring", "mirror.restored", "mirror.fetching", "mirror.fetched")
            fault = f"{place}:{kind}:{1 if restoring else draw.randint(1, 2)}"
            with server_at(room, proxy, prefix, acknowledge) as server:
                job = Job(number)
                server.start("" if restoring else fault)
                for _ in range(20):
                    if not server.alive:
                        server.start()
                    job.train(server.address, until=30, retry_for=5)
                    if job.last >= 30:
                        break
                deleted = restoring or draw.random() < 0.5
                if deleted:
                    _settled(server, job)
                if server.alive:
                    server.kill()
                if deleted:
                    shutil.rmtree(server.run_dir, ignore_errors=True)
                if not server.start(fault if restoring else ""):
                    start(server)
                expected = expected_at(server.address, number)
                assert expected.step >= job.last, "an acknowledged step is lost"
                one_more(server.address, expected, number)
                reached += (room / "fired").exists()
                runs += 1
    return {"runs": runs, "reached": reached}


def _settled(server: Server, job: Job) -> None:
    """Wait until the mirror has every step that was acknowledged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not server.alive:
            server.start()
        with contextlib.suppress(MaskwireError), maskwire.attach(server.address) as client:
            mirror = client.status().mirror
            if mirror is not None and mirror.step >= job.last:
                return
        time.sleep(0.02)
    raise AssertionError("the mirror does not catch up")


def two_servers(folder: Path, acknowledge: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """A second server takes the address over while a client trains on the first one."""
    draw = random.Random(f"two {acknowledge} {seed}")
    both = 0
    with store(seed) as proxy:
        prefix = f"two-{acknowledge}-{seed}"
        first = server_at(folder / "0", proxy, prefix, acknowledge, seconds=0.002)
        start(first)
        for number in range(1, rounds + 1):
            second = server_at(folder / str(number), proxy, prefix, acknowledge, seconds=0.002)
            job = Job(seed)
            # A server that trains nothing does not notice that it is fenced: the job does not give up.
            thread = threading.Thread(target=job.train_while_alive, args=(first,))
            thread.start()
            time.sleep(0.2 + draw.random())
            start(second)
            assert first.process is not None
            first.process.join(30)  # within a segment
            assert first.process.exitcode == FENCED, first.tail()
            thread.join()
            expected = expected_at(second.address, seed)
            for step, digest in job.acknowledged.items():
                if step <= expected.step:
                    assert expected.digests[1, step] == digest, "another history than the client's"
            ahead = max(0, job.last - expected.step)
            both += ahead
            if acknowledge == "mirrored":
                assert not ahead, "the first server acknowledged what the second does not have"
            one_more(second.address, expected, seed)
            assert not first.start(), "a directory that was left behind is served again"
            assert first.process.exitcode == FENCED, first.tail()
            first = second
        first.kill()
    return {"takeovers": rounds, "acknowledged by the first alone": both}
