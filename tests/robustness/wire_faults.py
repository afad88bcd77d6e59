"""R1: faults of every kind between client and server, and to both; the run ends as without one."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from robustness.expected import Expected, batch, fingerprint
from robustness.processes import Keeper, Server
from robustness.proxy import CALL_FAULTS, CallProxy, TcpProxy

import maskwire
from maskwire.errors import ConflictError, FencedError, UnavailableError, WrongRunError

KINDS = (*CALL_FAULTS, "reset", "kill", "stop", "takeover")


def plan(seed: int, steps: int, faults: int) -> list[tuple[int, str]]:
    """(step, fault), in order: every kind at least a twentieth of them, the cheap ones the rest."""
    least = {kind: max(1, -(-faults // 20)) for kind in KINDS}
    draw = random.Random(seed)
    cheap = ["drop before", "drop after", "duplicate", "reorder"]
    rest = [draw.choice(cheap) for _ in range(faults - sum(least.values()))]
    kinds = [kind for kind, count in least.items() for _ in range(count)] + rest
    draw.shuffle(kinds)
    return sorted((draw.randint(1, steps), kind) for kind in kinds)


class Nemesis(threading.Thread):
    """Does to the processes and connections what it is told, one after another, beside the training."""

    def __init__(self, server: Server, keeper: Keeper, tcp: TcpProxy, seed: int) -> None:
        super().__init__(daemon=True)
        self._server, self._keeper, self._tcp, self._seed = server, keeper, tcp, seed
        self._todo: list[str] = []
        self._wake = threading.Condition()
        self._over = False
        self.done: Counter[str] = Counter()
        self.failed: BaseException | None = None

    def add(self, fault: str) -> None:
        with self._wake:
            self._todo.append(fault)
            self._wake.notify()

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._todo or self._over)
                if not self._todo:
                    return
                fault = self._todo.pop(0)
            try:
                self._do(fault)
            except BaseException as error:
                self.failed = error
                return
            self.done[fault] += 1

    def _do(self, fault: str) -> None:
        if fault == "reset":
            self._tcp.reset()
        elif fault == "kill":
            while not self._server.alive:
                time.sleep(0.005)
            self._server.kill()
        elif fault == "stop":
            self._server.signal(signal.SIGSTOP)
            time.sleep(0.3)
            self._server.signal(signal.SIGCONT)
        else:  # another client takes over, trains the next step, and leaves
            target, name = self._server.address, "thief"
            with (
                contextlib.suppress(FencedError, ConflictError),  # the other may take over at once
                maskwire.connect(target, name=name, takeover=True, on_wait=lambda _: None) as thief,
            ):
                step = thief.step + 1
                thief.train_step(batch(self._seed, step))

    def finish(self) -> None:
        with self._wake:
            self._over = True
            self._wake.notify()
        self.join()


def run(folder: Path, seed: int, *, steps: int = 2000, faults: int = 1000) -> dict[str, Any]:
    """One seed; raises AssertionError for anything lost or doubled. What was injected, by kind."""
    began = time.monotonic()
    todo = plan(seed, steps, faults)
    with Server(folder, checkpoints__every_steps="100", serve__gap_seconds="1") as server:
        assert server.start(), server.tail()
        calls = CallProxy(server.address, seed)
        tcp = TcpProxy(calls.port)
        keeper = Keeper(server)
        keeper.start()
        nemesis = Nemesis(server, keeper, tcp, seed)
        nemesis.start()
        with maskwire.attach(server.address) as client:
            expected = Expected(client.status().digest)
        losses: dict[int, float] = {}

        def strike(upto: int) -> None:
            while todo and todo[0][0] <= upto:
                kind = todo.pop(0)[1]
                (calls if kind in CALL_FAULTS else nemesis).add(kind)

        trainer: maskwire.Trainer | None = None
        deadline = time.monotonic() + 900
        while True:
            assert time.monotonic() < deadline, f"stuck at step {trainer and trainer.step}"
            assert nemesis.failed is None, nemesis.failed
            try:
                if trainer is None:
                    trainer = maskwire.connect(
                        f"127.0.0.1:{tcp.port}", name="main", takeover=True, timeout=1.0, retry_for=60,
                        on_wait=lambda _: None,
                    )  # fmt: skip
                train(trainer, seed, steps, losses, strike)
                break
            except (FencedError, WrongRunError, UnavailableError):
                trainer = None  # taken over: this job would end here, and be started again
        nemesis.finish()
        keeper.release()
        assert nemesis.failed is None, repr(nemesis.failed)
        assert not todo
        with maskwire.connect(server.address, takeover=True, on_wait=lambda _: None) as last:
            for step in range(1, steps + 1):
                expected.train(batch(seed, step))
            assert (last.step, last.digest) == (steps, expected.digest), "lost or doubled"
            saved = last.checkpoint("end")
        assert losses.items() <= expected.losses.items(), "an answer that is not the step's"
        assert fingerprint(server.run_dir / "checkpoints" / saved.name) == expected.fingerprint
        calls.close()
        tcp.close()
    injected = calls.done + nemesis.done
    return {
        "faults": dict(injected), "steps": steps, "restarts": server.starts - 1,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def train(trainer: maskwire.Trainer, seed: int, steps: int, losses: dict[int, float], strike: Any) -> None:
    """Up to the last step, four in flight."""
    window: list[Any] = []
    for step in range(trainer.step + 1, steps + 1):
        strike(step)
        try:
            window.append(trainer.submit(batch(seed, step), step=step))
        except ConflictError:  # a step before it was refused, and says why
            for future in window:
                future.result()
            raise
        while len(window) == 4 or (step == steps and window):
            answer = window.pop(0).result()
            losses[answer.step] = answer.loss
