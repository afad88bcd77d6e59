from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_server import Script

from maskwire.data import prepare as preparing
from maskwire.v1 import training_service_pb2_grpc as pb_grpc


@pytest.fixture
def script() -> Iterator[Script]:
    servicer = Script()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    pb_grpc.add_TrainingServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield servicer
    server.stop(0).wait()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize a few records at a time, and save the progress after each group."""
    monkeypatch.setattr(preparing, "_BATCH_RECORDS", 7)
    monkeypatch.setattr(preparing, "_SAVE_BYTES", 0)
