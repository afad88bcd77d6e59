from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fork_server
import grpc
import pytest

from maskwire.v1 import training_service_pb2_grpc as pb_grpc

sys.path.insert(0, str(Path(__file__).parent))

from serving import COUNTING, OFFLINE, ServerProcess


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts server processes that end with the test; `seconds` takes the counter trainer.

    `held`: its steps wait from the first on, until `release`.
    """
    started: list[ServerProcess] = []

    def start(
        name: str = "a", *, seconds: float | None = None, fail: str = "", held: bool = False, **settings: str
    ) -> ServerProcess:
        seconds = 0 if held else seconds
        command = None if seconds is None else [*COUNTING, str(seconds), f"--hold={tmp_path / name / 'hold'}"]
        if command is not None and fail:
            command.append(f"--fail={fail}")
        if seconds is not None:  # what the counter trainer says of itself
            settings = {"model__num_tokens": "257", "model__mask_id": "256", **settings}
        server = ServerProcess(tmp_path / name, command, **settings)
        started.append(server)
        if held:
            server.hold()
        return server.start()

    yield start
    for server in started:
        server.kill()  # closes its output too where a failed test has killed it already


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server with the real trainer, for tests that leave it as able as they found it."""
    server = ServerProcess(tmp_path_factory.mktemp("shared")).start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def x_transformers_preloaded() -> None:
    """Servers that have x-transformers imported: each would spend seconds on it."""
    preload("x_transformers", "x_transformers.x_transformers")


@pytest.fixture(scope="session")
def preloaded(x_transformers_preloaded: None) -> None:
    """Servers that have the libraries of all models of other libraries imported."""
    preload("transformers", "transformers.models.bert.modeling_bert")
    preload("peft", "peft")


def preload(package: str, module: str) -> None:
    """Import a module into the servers that are forked from now on; skips without its package."""
    pytest.importorskip(package, reason="needs the extras huggingface and x-transformers")
    if fork_server.Process is fork_server.Forked:
        fork_server.CONNECTION.preload(module, environment=OFFLINE)


@pytest.fixture
def stub() -> Iterator[Callable[[ServerProcess], pb_grpc.TrainingServiceStub]]:
    channels: list[grpc.Channel] = []

    def connect(server: ServerProcess) -> pb_grpc.TrainingServiceStub:
        channels.append(grpc.insecure_channel(server.address))
        return pb_grpc.TrainingServiceStub(channels[-1])

    yield connect
    for channel in channels:
        channel.close()
