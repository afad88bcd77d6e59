"""Every call that a client makes has a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from scripted_server import TOKENS, Script

import maskwire
import maskwire.aio
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire.v1.values import TokenizerDescription

TIMEOUT, RETRY_FOR = 7.0, 20.0
FOREVER = 1e6  # at least: a generation may take thousands of passes
SECONDS = {
    "OpenSession": TIMEOUT, "CloseSession": 2.0, "TrainStep": TIMEOUT, "DeleteCheckpoint": TIMEOUT,
    "DownloadCheckpoint": TIMEOUT, "KeepTokenizer": TIMEOUT, "GetTokenizer": TIMEOUT, "ListSteps": TIMEOUT,
    "ListCheckpoints": TIMEOUT, "GetStatus": TIMEOUT,
    "EvalLoss": RETRY_FOR, "Checkpoint": RETRY_FOR, "RestoreCheckpoint": RETRY_FOR,
    "Generate": FOREVER,
}  # fmt: skip


class Server(Script):
    """The scripted server, with a checkpoint to download."""

    def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> Any:  # noqa: N802
        return pb.ListCheckpointsResponse(checkpoints=[pb.CheckpointInfo(name="a")])


class Deadlines(grpc.ServerInterceptor):
    """Records the deadlines of the calls that arrive. Whatever the scripted server lacks is UNIMPLEMENTED."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.target = ""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler, method = continuation(details), details.method.rpartition("/")[2]
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        behaviour = getattr(handler, kind)

        def recorded(request: Any, context: grpc.ServicerContext) -> Any:
            self.seen[method] = min(context.time_remaining() or 0.0, FOREVER)
            return behaviour(request, context)

        return handler._replace(**{kind: recorded})


@pytest.fixture
def deadlines() -> Iterator[Deadlines]:
    found = Deadlines()
    server = grpc.server(futures.ThreadPoolExecutor(8), interceptors=[found])
    pb_grpc.add_TrainingServiceServicer_to_server(Server(), server)
    found.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield found
    server.stop(0).wait()


def unanswered(trainer: Any, folder: Path) -> list[Callable[[], Any]]:
    """A call of each method that the scripted server does not implement."""
    return [
        lambda: trainer.eval_loss(TOKENS),
        lambda: trainer.generate(count=1, length=4),
        lambda: trainer.checkpoint("a"),
        lambda: trainer.steps_page(),
        lambda: trainer.delete("a"),
        lambda: trainer.download("a", folder),
        lambda: trainer.keep_tokenizer(TokenizerDescription("bytes")),
        lambda: trainer.status(),
    ]


def test_the_blocking_client_sets_a_deadline_on_every_call(deadlines: Deadlines, tmp_path: Path) -> None:
    with maskwire.connect(deadlines.target, timeout=TIMEOUT, retry_for=RETRY_FOR) as trainer:
        trainer.train_step(TOKENS)
        trainer.restore("a")
        assert trainer.tokenizer_of_run() is None
        for call in unanswered(trainer, tmp_path):
            with pytest.raises(maskwire.MaskwireError, match="UNIMPLEMENTED"):
                call()
    check(deadlines)


def test_the_asyncio_client_sets_a_deadline_on_every_call(deadlines: Deadlines, tmp_path: Path) -> None:
    async def run() -> None:
        async with await maskwire.aio.connect(
            deadlines.target, timeout=TIMEOUT, retry_for=RETRY_FOR
        ) as trainer:
            await trainer.train_step(TOKENS)
            await trainer.restore("a")
            assert await trainer.tokenizer_of_run() is None
            for call in unanswered(trainer, tmp_path):
                with pytest.raises(maskwire.MaskwireError, match="UNIMPLEMENTED"):
                    await call()

    asyncio.run(run())
    check(deadlines)


def check(deadlines: Deadlines) -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods}
    assert deadlines.seen.keys() == methods
    for method, seconds in deadlines.seen.items():
        assert 0 < seconds <= SECONDS[method] + 0.1, method
