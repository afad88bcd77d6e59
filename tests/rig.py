"""An engine around the counter trainer, for tests of the run's wing."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from counter import CounterTrainer

from maskwire.v1.digest import DigestVersion
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.config import Config
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.engine_options import EngineOptions
from maskwire_server.errors import Refused
from maskwire_server.journal.journal import Journal
from maskwire_server.requests import SessionRef, SessionRequest, StepRequest

if TYPE_CHECKING:
    import pytest

WAIT = 20
DIGEST = DigestVersion(2, CounterTrainer().info.num_tokens)
"""How a new run of the counter trainer hashes its payloads."""


def make_engine(
    run_dir: Path,
    whole: Config,
    trainer: Callable[[], CounterTrainer] = CounterTrainer,
    *,
    on_fatal: Callable[[BaseException], None] = lambda _: None,
    **options: Any,
) -> Engine:
    """An engine on a run directory, started and not waited for."""
    engine_options = EngineOptions(
        trainer, run_dir, seed=whole.run.seed, canonical=whole.canonical(),
        configuration=whole.as_json(), serve=whole.serve, checkpoints=whole.checkpoints,
        versions={}, **options,
    )  # fmt: skip
    engine = Engine(engine_options, on_fatal)
    engine.start()
    return engine


class Rig:
    """One run directory, and the engines that a test starts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: list[Engine] = []
        self.fatal: list[BaseException] = []
        self.trainer = CounterTrainer()

    def config(self, **sections: dict[str, Any]) -> Config:
        return config.load(None, **sections)

    def start(
        self,
        trainer: type[CounterTrainer] = CounterTrainer,
        *,
        clock: Callable[[], float] = time.monotonic,
        accept_inexact_replay: bool = False,
        accept_lost_history: int | None = None,
        pretrained: bool = False,
        **sections: dict[str, Any],
    ) -> Engine:
        whole = self.config(**sections)

        def build() -> CounterTrainer:
            self.trainer = trainer()
            return self.trainer

        engine = make_engine(
            self.folder, whole, build, on_fatal=self.fatal.append, clock=clock,
            accept_inexact_replay=accept_inexact_replay, accept_lost_history=accept_lost_history,
            pretrained=pretrained,
        )  # fmt: skip
        self.engines.append(engine)
        engine.wait_serving(WAIT)
        return engine


def payload(seed: int, first: int | None = None) -> Payload:
    ids = np.random.default_rng(seed).integers(10, 200, (2, 8))
    if first is not None:
        ids[0, 0] = first
    return Payload(Batch(ids, 2, 8), Modes())


def bare(seed: int, request_id: str | None = None, first: int | None = None) -> StepRequest:
    return StepRequest(payload(seed, first), request_id=request_id)


def open_session(engine: Engine, name: str = "me", nonce: str = "n", **fields: Any) -> SessionRef:
    answer = engine.open_session(SessionRequest(name, nonce, **fields)).result(WAIT)
    return SessionRef(answer.run_id, answer.lineage, answer.epoch)


def reason(future: Future[Any]) -> str:
    error = future.exception(WAIT)
    assert isinstance(error, Refused), error
    return error.reason


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def reason_of(call: Callable[[], Future[Any]]) -> str:
    try:
        return reason(call())
    except Refused as error:
        return error.reason


class FullDisk(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_FULL


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Hold every transaction back until what this yields is called."""
    transaction, flushed = Journal.transaction, threading.Event()

    def waiting(self: Journal, write: Callable[[], object]) -> None:
        assert flushed.wait(WAIT)
        transaction(self, write)

    monkeypatch.setattr(Journal, "transaction", waiting)
    try:
        yield flushed.set
    finally:
        flushed.set()
