"""The service: each method parses, submits and replies."""

from __future__ import annotations

import base64
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Protocol, TypeVar

import grpc

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire_server.errors import Refused, invalid_field, shortage
from maskwire_server.history import StepsPage, StepsRequest
from maskwire_server.requests import (
    DownloadRequest,
    EvalRequest,
    GenerateRequest,
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.results import (
    CheckpointInfo,
    Chunk,
    EvalAnswer,
    GenerateAnswer,
    Limits,
    ModelInfo,
    RestoreAnswer,
    SessionAnswer,
    Status,
    StepAnswer,
)
from maskwire_server.rpc import decoding, encoding
from maskwire_server.rpc import generate as generating
from maskwire_server.rpc import list_steps as listing
from maskwire_server.rpc.list_steps import MOST_LISTS
from maskwire_server.rpc.status import abort

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

MOST_DOWNLOADS = 4  # at once: each holds a worker for as long as its client takes
MOST_GENERATIONS = 8  # likewise
_DEFAULT_PAGE, _LARGEST_PAGE = 50, 1000


class Generation(Protocol):
    """Rows on their way: iterate over it for the answers."""

    def __iter__(self) -> Iterator[GenerateAnswer]:
        """Answers until the last; raises Refused, or CancelledError after `cancel`."""

    def cancel(self) -> None:
        """The reader has gone."""


class Engine(Protocol):
    """What the service needs of an engine; a `Refused` comes out of a call or of its future."""

    @property
    def info(self) -> ModelInfo | None:
        """What is served; None until the model is built."""

    @property
    def limits(self) -> Limits:
        """Bounds on one request."""

    def train_step(self, request: StepRequest) -> Future[StepAnswer]:
        """Train on one batch."""

    def step_refused(self, session: SessionRef | None, step: int | None) -> None:
        """A step was refused before it came to the engine."""

    def eval_loss(self, request: EvalRequest) -> Future[EvalAnswer]:
        """Evaluate one batch."""

    def generate(self, request: GenerateRequest) -> Generation:
        """Sample rows."""

    def open_session(self, request: SessionRequest) -> Future[SessionAnswer]:
        """Make the caller the run's writer."""

    def close_session(self, session: SessionRef) -> Future[None]:
        """End the caller's session."""

    def save(self, request: SaveRequest) -> Future[CheckpointInfo]:
        """Save a checkpoint."""

    def restore(self, request: RestoreRequest) -> Future[RestoreAnswer]:
        """Go back to a checkpoint."""

    def delete(self, name: str) -> Future[None]:
        """Delete a checkpoint."""

    def checkpoints(self) -> list[CheckpointInfo]:
        """The whole checkpoints, newest first."""

    def download(self, request: DownloadRequest) -> Iterator[Chunk]:
        """A checkpoint's files in chunks."""

    def list_steps(self, request: StepsRequest) -> Future[StepsPage]:
        """Recorded steps."""

    def status(self) -> Status:
        """Is it stuck or working?"""


class TrainingService(pb_grpc.TrainingServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started = time.monotonic()
        self._downloads = threading.Semaphore(MOST_DOWNLOADS)
        self._generations = threading.Semaphore(MOST_GENERATIONS)
        self._lists = threading.Semaphore(MOST_LISTS)

    def OpenSession(  # noqa: N802
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: self._engine.open_session(decoding.read_open(request)),
            lambda value: encoding.session(value, self._info(), self._engine.limits),
        )

    def CloseSession(  # noqa: N802
        self, request: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: self._engine.close_session(decoding.read_session(request.session)),
            lambda _: pb.CloseSessionResponse(),
        )

    def TrainStep(  # noqa: N802
        self, request: pb.TrainStepRequest, context: grpc.ServicerContext
    ) -> pb.TrainStepResponse:
        """See the proto."""
        return self._serve(context, lambda: self._submit_step(request), encoding.step)

    def _submit_step(self, request: pb.TrainStepRequest) -> Future[StepAnswer]:
        try:
            step = decoding.read_step(request, self._info(), self._engine.limits)
        except Exception:
            session = decoding.read_session(request.session) if request.HasField("session") else None
            self._engine.step_refused(session, request.step if request.HasField("step") else None)
            raise
        return self._engine.train_step(step)

    def EvalLoss(  # noqa: N802
        self, request: pb.EvalLossRequest, context: grpc.ServicerContext
    ) -> pb.EvalLossResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: self._engine.eval_loss(decoding.read_eval(request, self._info(), self._engine.limits)),
            encoding.evaluation,
        )

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        """See the proto."""
        yield from self._stream(
            context,
            self._generations,
            MOST_GENERATIONS,
            "generations",
            lambda: self._generate(request, context),
        )

    def _generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        wanted = generating.read_generate(request, self._info(), self._engine.limits)
        generation = self._engine.generate(wanted)
        try:
            if not context.add_callback(generation.cancel):
                raise CancelledError
            for answer in generation:
                yield generating.answer(answer, wanted.prompts.lengths)
        finally:
            generation.cancel()

    def Checkpoint(  # noqa: N802
        self, request: pb.CheckpointRequest, context: grpc.ServicerContext
    ) -> pb.CheckpointResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: self._engine.save(decoding.read_save(request)),
            lambda info: pb.CheckpointResponse(checkpoint=encoding.checkpoint(info)),
        )

    def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        """See the proto."""
        return self._serve(context, lambda: _done(request), self._page)

    def _page(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        if request.page_size < 0:
            raise invalid_field("page_size", f"page_size must be at least 0, got {request.page_size}")
        size = min(request.page_size or _DEFAULT_PAGE, _LARGEST_PAGE)
        found = self._engine.checkpoints()
        start = 0
        if request.page_token:
            # The token names the last checkpoint of the page before, so that a page stays right when
            # checkpoints come and go; one that has gone meanwhile cannot be gone on from.
            try:
                last = base64.urlsafe_b64decode(request.page_token.encode()).decode()
                start = [info.name for info in found].index(last) + 1
            except ValueError:
                raise invalid_field(
                    "page_token", f"page_token {request.page_token[:80]!r} is unknown or too old; begin again"
                ) from None
        page = found[start : start + size]
        more = start + size < len(found)
        return pb.ListCheckpointsResponse(
            checkpoints=[encoding.checkpoint(info) for info in page],
            next_page_token=base64.urlsafe_b64encode(page[-1].name.encode()).decode() if more else "",
        )

    def RestoreCheckpoint(  # noqa: N802
        self, request: pb.RestoreCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.RestoreCheckpointResponse:
        """See the proto."""
        return self._serve(
            context, lambda: self._engine.restore(decoding.read_restore(request)), encoding.restore
        )

    def DeleteCheckpoint(  # noqa: N802
        self, request: pb.DeleteCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.DeleteCheckpointResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: self._engine.delete(decoding.read_checkpoint_name(request.name)),
            lambda _: pb.DeleteCheckpointResponse(),
        )

    def DownloadCheckpoint(  # noqa: N802
        self, request: pb.DownloadCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadCheckpointResponse]:
        """See the proto."""
        yield from self._stream(
            context,
            self._downloads,
            MOST_DOWNLOADS,
            "downloads",
            lambda: map(encoding.chunk, self._engine.download(decoding.read_download(request))),
        )

    def _stream(
        self,
        context: grpc.ServicerContext,
        room: threading.Semaphore,
        most: int,
        what: str,
        begin: Callable[[], Iterator[R]],
    ) -> Iterator[R]:
        """Answers as they come; at most so many streams of a kind at once."""
        if not room.acquire(blocking=False):
            abort(context, _too_many(most, what))
        try:
            yield from begin()
        except Refused as refusal:
            abort(context, refusal)
        except CancelledError:
            abort(context, _gone(context))
        except Exception as error:
            abort(context, shortage(error) or _unexpected())
        finally:
            room.release()

    def ListSteps(  # noqa: N802
        self, request: pb.ListStepsRequest, context: grpc.ServicerContext
    ) -> pb.ListStepsResponse:
        """See the proto."""
        return self._serve(context, lambda: self._list_steps(request), listing.answer)

    def _list_steps(self, request: pb.ListStepsRequest) -> Future[StepsPage]:
        wanted = listing.read_list(request)
        if not self._lists.acquire(blocking=False):
            raise _too_many(MOST_LISTS, "lists of steps")
        try:
            page = self._engine.list_steps(wanted)
        except BaseException:
            self._lists.release()
            raise
        page.add_done_callback(lambda _: self._lists.release())
        return page

    def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        """See the proto."""
        return self._serve(
            context,
            lambda: _done(request),
            lambda _: encoding.status(self._engine.status(), self._engine.limits, self._started),
        )

    def _info(self) -> ModelInfo:
        info = self._engine.info
        if info is None:
            raise Refused("RECOVERING", "the server is building the model; ask again")
        return info

    def _serve(
        self,
        context: grpc.ServicerContext,
        submit: Callable[[], Future[T]],
        reply: Callable[[T], R],
    ) -> R:
        try:
            return reply(_wait(submit(), context))
        except Refused as refusal:
            abort(context, refusal)
        except CancelledError:
            abort(context, _gone(context))
        except Exception as error:
            abort(context, shortage(error) or _unexpected())


def _too_many(most: int, what: str) -> Refused:
    return Refused("QUEUE_FULL", f"{most} {what} are under way; ask again", queue_limit=most)


def _gone(context: grpc.ServicerContext) -> Refused:
    """For whatever still hears of a call that its client gave up."""
    left = context.time_remaining()
    if left is not None and left <= 0:
        return Refused(
            "DEADLINE_EXCEEDED",
            "the client's deadline passed before the answer; whether a step was applied is unknown: ask "
            "again with the same request id",
        )
    return Refused("CANCELLED", "the client cancelled the call, or went away")


def _unexpected() -> Refused:
    """For the error that is being handled: its text can hold anything, and stays in the log."""
    error_id = uuid.uuid4().hex[:12]
    log.exception("unexpected error %s", error_id)
    return Refused("INTERNAL", f"unexpected; the server's log explains error {error_id}", error_id=error_id)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _wait(future: Future[T], context: grpc.ServicerContext) -> T:
    """The future's result; it is cancelled when the client has gone, so that nobody waits for it."""

    def give_up() -> None:
        future.cancel()

    if not context.add_callback(give_up):
        give_up()
        raise CancelledError
    return future.result()
