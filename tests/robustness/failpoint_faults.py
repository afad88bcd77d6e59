"""R2: a kill, an error of the disk or a delay at every failpoint; what was acknowledged is there."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from robustness.expected import Expected, batch
from robustness.processes import Keeper, Server

import maskwire
from maskwire.errors import MaskwireError

SETTINGS = {
    "checkpoints__every_steps": "3", "checkpoints__keep_last": "2", "serve__gap_seconds": "1",
}  # fmt: skip
SAVING = tuple(
    f"checkpoint.{moment}"
    for moment in ("copying", "copied", "begun", "written", "flushed", "drafted", "renamed", "published")
)


def run(folder: Path, place: str, kind: str, seed: int) -> bool:
    """StepAdmission, saves, a kill, a restore and a clean stop, with one fault; whether it was reached.

    Raises AssertionError when a step that was acknowledged is missing, or differs.
    """
    draw = random.Random(f"{place} {kind} {seed}")
    fault = f"{place}:{kind}:{draw.randint(1, _passes(place))}"
    second = place.startswith(("recovery.", "restore."))  # there must be something to come back to
    with Server(folder, **SETTINGS) as server:
        server.start("" if second else fault)
        keeper = Keeper(server)
        keeper.start()
        with maskwire.connect(server.address, name="job", retry_for=60, timeout=5, on_wait=_quiet) as first:
            start = first.digest if first.step == 0 else None
        assert start is not None
        expected = Expected(start)
        writer = _Writer(server, expected, seed)
        writer.train(7)
        writer.save("seven")
        writer.train(2)
        keeper.paused = True
        if server.alive:
            server.kill()
        again = draw.random() < 0.5
        server.start(fault if second or again or not _reached(folder) else "")
        keeper.paused = False
        writer.train(3)
        writer.restore("seven", 7)
        writer.train(draw.randint(1, 4))
        writer.close()
        keeper.release()
        if server.alive:
            server.terminate()
        server.start()
        with maskwire.attach(server.address) as client:
            status = client.status()
        found = expected.digests.get((status.lineage, status.durable_step))
        assert (status.lineage, status.durable_step) >= (expected.lineage, expected.step), "lost"
        assert (status.lineage, status.durable_step) == (expected.lineage, expected.step), (
            "more than was sent"
        )
        assert status.digest == found, "another history than the client's"
        writer.train(1)  # its loss tells whether the weights are those of the history
        writer.close()
        return _reached(folder)


def _reached(folder: Path) -> bool:
    """Whether the fault has happened. If saves are slow, the kill can come before the process gets there."""
    return (folder / "fired").exists()


def _passes(place: str) -> int:
    """How often `run` passes a place at least before its second start, of those that it passes by then."""
    if place.startswith("step.") or place in ("journal.begin", "journal.written", "journal.committed"):
        return 8
    if place in SAVING:
        return 3  # the run's first, an automatic one at least, the named one
    return 1


def _quiet(_: str) -> None:
    pass


class _Writer:
    """A job that is started again until its steps are done; what it expects is what it was answered."""

    def __init__(self, server: Server, expected: Expected, seed: int) -> None:
        self._server, self._expected, self._seed = server, expected, seed
        self._trainer: maskwire.Trainer | None = None

    def _connected(self) -> maskwire.Trainer:
        if self._trainer is None:
            self._trainer = maskwire.connect(
                self._server.address, name="job", takeover=True, retry_for=60, timeout=5, on_wait=_quiet
            )
            self._catch_up(self._trainer.step)
        return self._trainer

    def _catch_up(self, step: int) -> None:
        """What an attempt sent whose answer it did not live to see."""
        while self._expected.step < step:
            self._expected.train(self._batch(self._expected.step + 1))

    def _batch(self, step: int) -> np.ndarray[Any, Any]:
        return batch(self._seed + self._expected.lineage - 1, step)

    def train(self, count: int) -> None:
        until = self._expected.step + count
        for _ in range(50):
            try:
                trainer = self._connected()
                assert trainer.step >= self._expected.step, "an acknowledged step is missing"
                self._catch_up(trainer.step)
                while self._expected.step < until:
                    step = self._expected.step + 1
                    answer = trainer.train_step(self._batch(step))
                    self._expected.train(self._batch(step))
                    assert answer.step == step
                    assert answer.loss == self._expected.losses[step]
                    assert answer.digest == self._expected.digest
                return
            except MaskwireError as error:
                self._failed(error)
        raise AssertionError("it never gets through")

    def _failed(self, error: MaskwireError) -> None:
        assert error.reason not in ("HISTORY_LOST", "DIGEST_MISMATCH"), error
        self.close()

    def save(self, name: str) -> None:
        for _ in range(50):
            try:
                trainer = self._connected()
                if name not in [info.name for info in trainer.checkpoints()]:
                    info = trainer.checkpoint(name)
                    assert info.digest == self._expected.digest
                return
            except MaskwireError as error:
                self._failed(error)
        raise AssertionError("it is never saved")

    def restore(self, name: str, step: int) -> None:
        lineage = self._expected.lineage + 1
        for _ in range(50):
            try:
                with maskwire.attach(self._server.address, retry_for=60, timeout=5, on_wait=_quiet) as client:
                    if client.status().lineage < lineage:
                        client.restore(name)
                self._expected.restore(step)
                self.close()
                return
            except MaskwireError as error:
                self._failed(error)
        raise AssertionError("it is never restored")

    def close(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            with contextlib.suppress(MaskwireError):
                trainer.close()


def terminate(folder: Path, seed: int) -> int:
    """R8: SIGTERM at a random instant under load: exit 0 in the grace period, nothing acknowledged lost.

    The last step that was acknowledged before the end.
    """
    draw = random.Random(seed)
    with Server(folder, seconds=draw.choice([0.0, 0.002, 0.02]), checkpoints__every_steps="5") as server:
        server.spawn()
        if draw.random() < 0.15:  # while it starts
            server.process.join(draw.random() * 0.1)  # type: ignore[union-attr]
            code = server.terminate()
            # Before it has come to its first line, SIGTERM is the interpreter's, and ends it.
            assert code == 0 or (code == -signal.SIGTERM and not server.tail()), server.tail()
            assert server.start()
        assert server.ready()
        with maskwire.attach(server.address) as client:
            expected = Expected(client.status().digest)
        acknowledged = 0
        threading.Timer(draw.random() * 0.5, server.signal, (signal.SIGTERM,)).start()
        with (
            contextlib.suppress(MaskwireError),
            maskwire.connect(server.address, window=4, retry_for=0.2, timeout=5, on_wait=_quiet) as trainer,
        ):
            in_flight: deque[Any] = deque()
            for step in itertools.count(1):  # until there is no server any more
                in_flight.append(trainer.submit(batch(seed, step)))
                if len(in_flight) == 4:
                    acknowledged = in_flight.popleft().result(20).step
        server.process.join(30)  # type: ignore[union-attr]
        assert server.process.exitcode == 0, server.tail()  # type: ignore[union-attr]
        assert server.start()
        with maskwire.attach(server.address) as client:
            status = client.status()
        assert status.durable_step >= acknowledged, "an acknowledged step is missing"
        for step in range(1, status.durable_step + 1):
            expected.train(batch(seed, step))
        assert status.digest == expected.digest
        writer = _Writer(server, expected, seed)
        writer.train(1)  # the weights, too, are those of the history
        writer.close()
        return acknowledged
