"""What the health service says while a server starts, around an engine of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from counter import CounterTrainer
from rig import WAIT, make_engine, reason_of
from serving import health

from maskwire.v1.values import RunState
from maskwire_server import config
from maskwire_server.engine.engine import Engine
from maskwire_server.requests import SaveRequest
from maskwire_server.rpc.server import Server


@contextmanager
def starting(folder: Path, trainer: Callable[[], CounterTrainer]) -> Iterator[tuple[Engine, str]]:
    """An engine that recovers, and the address of the server before it."""
    whole = config.load(None, serve={"address": "127.0.0.1:0"})
    gate = threading.Event()

    def build() -> CounterTrainer:
        assert gate.wait(WAIT)
        return trainer()

    engine = make_engine(folder, whole, build)
    server = Server(engine, whole.serve)
    engine.on_state(server.on_state)
    address = server.start()
    gate.set()
    try:
        yield engine, address
    finally:
        server.stop(0)
        engine.close()


def test_a_server_is_live_while_it_recovers_and_ready_only_after_its_warm_up(tmp_path: Path) -> None:
    warming, warm = threading.Event(), threading.Event()

    class Slow(CounterTrainer):
        def warm_up(self) -> None:
            warming.set()
            assert warm.wait(WAIT)

    with starting(tmp_path / "run", Slow) as (engine, address):
        assert warming.wait(WAIT)
        assert engine.status().state is RunState.RECOVERING
        assert health(address) == (False, False, True)
        warm.set()
        engine.wait_serving(WAIT)
        assert health(address) == (True, True, True)


def test_a_server_whose_recovery_failed_says_so_and_is_not_live(tmp_path: Path) -> None:
    class Broken(CounterTrainer):
        def warm_up(self) -> None:
            raise RuntimeError("the secret of the broken device")

    with starting(tmp_path / "run", Broken) as (engine, address):
        with pytest.raises(RuntimeError, match="secret"):
            engine.wait_serving(WAIT)
        status = engine.status()
        assert status.state is RunState.RECOVERY_FAILED
        assert status.last_error == "recovery failed: RuntimeError"
        assert health(address) == (False, False, False)
        assert reason_of(lambda: engine.save(SaveRequest("a"))) == "RECOVERING"
