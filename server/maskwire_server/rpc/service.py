"""The service: each method decodes its request, calls the engine and encodes the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import TypeVar

import grpc

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire.v1.values import ModelInfo
from maskwire_server.errors import Refused
from maskwire_server.results import StepAnswer
from maskwire_server.rpc import decoding, encoding, generate, list_checkpoints, list_steps
from maskwire_server.rpc.concurrency_limit import ConcurrencyLimit, PacedCalls
from maskwire_server.rpc.engine_interface import EngineInterface
from maskwire_server.rpc.error_status import abort_on_error

T = TypeVar("T")

MAX_DOWNLOADS = 4  # a download or generation occupies a worker for as long as its client reads
MAX_GENERATIONS = 8
MAX_LISTS = 2  # lists of steps are read by the committer thread, between its transactions


class TrainingService(pb_grpc.TrainingServiceServicer):
    """Serves one engine. The proto describes each method."""

    def __init__(
        self, engine: EngineInterface, caller: Callable[[grpc.ServicerContext], str] = lambda _: ""
    ) -> None:
        """`caller` returns a name for a call's credential, or "" if no limit per credential applies."""
        self._engine = engine
        self._caller = caller
        self._started = time.monotonic()
        self._downloads = ConcurrencyLimit(MAX_DOWNLOADS, "downloads")
        self._generations = ConcurrencyLimit(MAX_GENERATIONS, "generations")
        self._lists = ConcurrencyLimit(MAX_LISTS, "lists of steps")
        self._paced_lists = PacedCalls()

    def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionResponse:
        with abort_on_error(context):
            session = _wait(self._engine.open_session(decoding.read_open(request)), context)
            kept = self._engine.tokenizer.digest
            return encoding.session(session, self._model_info(), self._engine.limits, kept)

    def CloseSession(
        self, request: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionResponse:
        with abort_on_error(context):
            _wait(self._engine.close_session(decoding.read_session(request.session)), context)
            return pb.CloseSessionResponse()

    def TrainStep(self, request: pb.TrainStepRequest, context: grpc.ServicerContext) -> pb.TrainStepResponse:
        with abort_on_error(context):
            return encoding.step(_wait(self._submit_step(request), context))

    def _submit_step(self, request: pb.TrainStepRequest) -> Future[StepAnswer]:
        try:
            step = decoding.read_step(request, self._model_info(), self._engine.limits)
        except Exception:
            session = decoding.read_session(request.session) if request.HasField("session") else None
            self._engine.step_refused(session, request.step if request.HasField("step") else None)
            raise
        return self._engine.train_step(step)

    def EvalLoss(self, request: pb.EvalLossRequest, context: grpc.ServicerContext) -> pb.EvalLossResponse:
        with abort_on_error(context):
            evaluation = decoding.read_eval(request, self._model_info(), self._engine.limits)
            evaluation = replace(evaluation, credential=self._caller(context))
            return encoding.evaluation(_wait(self._engine.eval_loss(evaluation), context))

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        with abort_on_error(context), self._generations:
            decoded = generate.read_generate(request, self._model_info(), self._engine.limits)
            decoded = replace(decoded, credential=self._caller(context))
            generation = self._engine.generate(decoded)
            try:
                if not context.add_callback(generation.cancel):
                    raise CancelledError
                for answer in generation:
                    yield generate.answer(answer, decoded.prompts.lengths)
            finally:
                generation.cancel()

    def Checkpoint(
        self, request: pb.CheckpointRequest, context: grpc.ServicerContext
    ) -> pb.CheckpointResponse:
        with abort_on_error(context):
            saved = _wait(self._engine.save(decoding.read_save(request)), context)
            return pb.CheckpointResponse(checkpoint=encoding.checkpoint(saved))

    def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        with abort_on_error(context):
            return list_checkpoints.answer(request, self._engine)

    def RestoreCheckpoint(
        self, request: pb.RestoreCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.RestoreCheckpointResponse:
        with abort_on_error(context):
            return encoding.restore(_wait(self._engine.restore(decoding.read_restore(request)), context))

    def DeleteCheckpoint(
        self, request: pb.DeleteCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.DeleteCheckpointResponse:
        with abort_on_error(context):
            _wait(self._engine.delete(decoding.read_checkpoint_name(request.name)), context)
            return pb.DeleteCheckpointResponse()

    def DownloadCheckpoint(
        self, request: pb.DownloadCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadCheckpointResponse]:
        with abort_on_error(context), self._downloads:
            yield from map(encoding.chunk, self._engine.download(decoding.read_download(request)))

    def KeepTokenizer(
        self, request: pb.KeepTokenizerRequest, context: grpc.ServicerContext
    ) -> pb.KeepTokenizerResponse:
        with abort_on_error(context):
            self._engine.tokenizer.keep(decoding.read_tokenizer(request))
            return pb.KeepTokenizerResponse()

    def GetTokenizer(
        self,
        request: pb.GetTokenizerRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.GetTokenizerResponse:
        with abort_on_error(context):
            return encoding.tokenizer(self._engine.tokenizer.of_run())

    def ListSteps(self, request: pb.ListStepsRequest, context: grpc.ServicerContext) -> pb.ListStepsResponse:
        with abort_on_error(context):
            decoded = list_steps.read_list(request)
            with self._lists, self._paced_lists as turn:
                page = _wait(self._engine.list_steps(decoded), context)
                turn.took(page.seconds)
                return list_steps.answer(page)

    def GetStatus(
        self,
        request: pb.GetStatusRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.GetStatusResponse:
        with abort_on_error(context):
            return encoding.status(self._engine.status(), self._engine.limits, self._started)

    def _model_info(self) -> ModelInfo:
        info = self._engine.info
        if info is None:
            raise Refused("RECOVERING", "the server is still building the model; retry later")
        return info


def _wait(future: Future[T], context: grpc.ServicerContext) -> T:
    """Wait for the future's result. Cancels the future if the deadline or the client ends the call first."""
    if not context.add_callback(future.cancel):  # type: ignore[arg-type]  # gRPC ignores what it returns
        future.cancel()
        raise CancelledError
    # Wait on a separate lock: future.result() wakes this thread while the future's lock is still held.
    done = threading.Lock()
    done.acquire()
    future.add_done_callback(lambda _: done.release())
    done.acquire()
    return future.result()
