"""The asyncio client: what `maskwire.client` has, awaited, over the same protocol.

async with await maskwire.aio.connect("127.0.0.1:50051") as trainer:
    result = await trainer.train_step(tokens)
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from maskwire import results
from maskwire.arguments import call_back
from maskwire.client import CLOSE_TIMEOUT, EXIT_GRACE
from maskwire.credentials import Door, DoorOptions
from maskwire.errors import EventLoopError, MaskwireError, read_failure
from maskwire.ownership import ProcessBound
from maskwire.protocol import codec
from maskwire.protocol.calls import (
    Asking,
    Call,
    Effect,
    EvalOptions,
    GenerateOptions,
    Give,
    ListOptions,
    Next,
    Pause,
    RetryPolicy,
    StepOptions,
    Stream,
    Talk,
    Until,
    Work,
    new_id,
)
from maskwire.protocol.download import Progress
from maskwire.protocol.evaluation import Progress as Evaluating
from maskwire.protocol.writer import Position, Writing
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from maskwire.protocol.fit import FitResult

log = logging.getLogger(__name__)
T = TypeVar("T")

LEAVE_SECONDS = 10.0  # for the steps in flight, once cancelled


async def connect(
    target: str,
    *,
    name: str | None = None,
    takeover: bool = False,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    window: int = 4,
    on_wait: Callable[[str], None] | None = None,
    on_takeover: Callable[[str], None] | None = None,
    **door: Unpack[DoorOptions],
) -> Trainer:
    """Open a session and return its trainer; the arguments are those of `maskwire.connect`."""
    talk = Writing(
        target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic, name, window
    )
    trainer = Trainer(Door.of(target, **door), talk)
    try:
        await trainer._drive(talk.open(takeover=takeover))
        if talk.took_over:
            (on_takeover or log.warning)(talk.took_over)
    except BaseException:
        await trainer.close()
        raise
    return trainer


def attach(
    target: str,
    *,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    on_wait: Callable[[str], None] | None = None,
    **door: Unpack[DoorOptions],
) -> Client:
    """A client without a session; the arguments are those of `maskwire.attach`."""
    talk = Asking(target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic)
    return Client(Door.of(target, **door), talk)


class Client(ProcessBound):
    """The calls that need no session; see `maskwire.client.Client`.

    It may be made before a loop runs, and belongs to the loop that uses it first: EventLoopError in
    another, ForkError in a forked child.
    """

    def __init__(self, door: Door, talk: Asking) -> None:
        super().__init__()
        self.target = door.target
        self._talk = talk
        self._door = door
        self._metadata = door.metadata
        self._loop: asyncio.AbstractEventLoop | None = None  # the first that used it
        self._channel: Any = None  # made there: gRPC binds it to the loop
        self._stub: Any = None
        self._closed = False
        self._changed = asyncio.Event()  # set, and replaced, whenever a conversation went on

    async def eval_loss(self, tokens: Any, **options: Unpack[EvalOptions]) -> results.EvalResult:
        """Evaluate one batch; changes nothing."""
        return await self._drive(self._talk.eval_loss(tokens, **options))

    async def evaluate(
        self,
        data: Any,
        *,
        rows: int | None = None,
        batch_size: int | None = None,
        on_progress: Evaluating | None = None,
        **options: Unpack[EvalOptions],
    ) -> results.EvalResult:
        """Evaluate a whole data set; see `maskwire.client.Client.evaluate`.

        `on_progress` is called on a thread of its own.
        """
        return await self._drive(
            self._talk.evaluate(data, rows=rows, batch_size=batch_size, on_progress=on_progress, **options)
        )

    async def generate(
        self, prompts: Any = None, **options: Unpack[GenerateOptions]
    ) -> results.GenerateResult:
        """Sample rows; see `maskwire.client.Client.generate`."""
        return await self._drive(self._talk.generate(prompts, **options))

    def generate_steps(
        self, prompts: Any = None, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[results.GenerateResult]:
        """Sample rows, with a result for each pass: `async for` over it; see the blocking client's."""
        return self._iterate(self._talk.generate_steps(prompts, **options))

    async def checkpoint(
        self,
        name: str = "",
        *,
        labels: Mapping[str, str] | None = None,
        score: float | None = None,
        expected_lineage: int | None = None,
        expected_step: int | None = None,
    ) -> results.CheckpointInfo:
        """Save the run's state; it is durable and verified then."""
        return await self._drive(self._talk.checkpoint(name, labels, score, expected_lineage, expected_step))

    async def checkpoints(self) -> list[results.CheckpointInfo]:
        """The run's whole checkpoints, newest first."""
        return await self._drive(self._talk.checkpoints())

    def list_steps(self, **options: Unpack[ListOptions]) -> AsyncIterator[results.RecordedStep]:
        """The recorded steps of one lineage: `async for` over it; see the blocking client's."""
        return self._iterate(self._talk.list_steps(**options))

    async def steps_page(
        self, *, page_size: int = 0, page_token: str = "", **options: Unpack[ListOptions]
    ) -> results.StepsPage:
        """One page of `list_steps`, which also tells where the lineage began."""
        return await self._drive(self._talk.steps_page(page_size, page_token, **options))

    async def delete(self, name: str) -> None:
        """Delete a checkpoint; refused while something needs it."""
        return await self._drive(self._talk.delete(name))

    async def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        """Go back to a checkpoint, on a new lineage."""
        return await self._drive(self._talk.restore(name, expected_step))

    async def download(
        self,
        name: str,
        folder: str | Path,
        *,
        weights: bool = False,
        ema: bool = False,
        on_progress: Progress | None = None,
    ) -> Path:
        """Fetch a checkpoint into `folder`; see `maskwire.client.Client.download`."""
        return await self._drive(
            self._talk.download(name, Path(folder), weights=weights, ema=ema, on_progress=on_progress)
        )

    async def status(self) -> results.Status:
        """Is it stuck or working?"""
        return await self._drive(self._talk.status())

    async def close(self) -> None:
        """End the connection. Does nothing in a forked child: the connection is the parent's."""
        if self._inherited or self._loop is None:
            self._closed = True
            return
        self._enter()
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    def _enter(self) -> None:
        """Connect in the first loop that comes here, and refuse any other."""
        self._check_process()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._channel = self._door.channel(grpc.aio)
            self._stub = pb_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        elif loop is not self._loop:
            state = "which has ended" if self._loop.is_closed() else "which still runs"
            raise EventLoopError(
                f"this {type(self).__name__} belongs to the event loop that used it first, {state}, and "
                "gRPC cannot move it to another: make a client in each loop (maskwire.aio.attach or "
                "connect), or do everything in one asyncio.run",
                reason="OTHER_EVENT_LOOP",
            )

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _drive(self, talk: Talk[T], effect: Effect | None = None) -> T:
        """Do what a conversation yields until it ends; `effect` is what it yielded last."""
        self._enter()
        try:
            while True:
                reply = None if effect is None else await self._do(effect)
                try:
                    effect = self._advance(talk, reply)
                except StopIteration as done:
                    value: T = done.value
                    return value
        finally:
            self._end(talk)

    async def _iterate(self, talk: Talk[None]) -> AsyncIterator[Any]:
        """What a conversation gives."""
        self._enter()
        effect: Effect | None = None
        stream: Stream | None = None
        try:
            while True:
                reply = None if effect is None else await self._do(effect)
                try:
                    effect = self._advance(talk, reply)
                except StopIteration:
                    return
                if isinstance(effect, Next):
                    stream = effect.stream
                elif isinstance(effect, Give):
                    yield effect.value
        finally:
            self._end(talk, stream)

    def _advance(self, talk: Talk[Any], reply: Any) -> Effect:
        """Run a conversation up to its next effect.

        Code that ran since the last one (a callback, or the reader of an iterator) may have forked.
        """
        self._check_process()
        try:
            return talk.send(reply)
        finally:
            self._wake()

    def _end(self, talk: Talk[Any], stream: Stream | None = None) -> None:
        """End a conversation that may have more to do. Does nothing in a forked child: it is the parent's."""
        if self._inherited:
            return
        talk.close()
        self._wake()
        if stream is not None:
            stream.hang_up()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _do(self, effect: Effect) -> Any:
        if isinstance(effect, Until):
            while not effect.holds():
                await self._changed.wait()
            return None
        if isinstance(effect, Pause):
            await asyncio.sleep(effect.seconds)
            return None
        if isinstance(effect, Work):
            return await asyncio.to_thread(call_back, "a callback", effect.act)
        if isinstance(effect, Give):
            return None
        if self._closed:
            raise MaskwireError("this client is closed; make another one")
        if isinstance(effect, Next):
            return await self._next(effect.stream)
        return await self._call(effect)

    async def _next(self, stream: Stream) -> Any:
        try:
            if stream.call is None:
                method = getattr(self._stub, stream.method)
                stream.call = method(stream.request, timeout=stream.timeout, metadata=self._metadata)
            message = await stream.call.read()
        except grpc.RpcError as error:
            return read_failure(error)
        return None if message is grpc.aio.EOF else message

    async def _call(self, call: Call) -> Any:
        method = getattr(self._stub, call.method)
        try:
            answer = method(call.request, timeout=call.timeout, metadata=self._metadata)
            if call.take is None:
                return await answer
            async for message in answer:
                await asyncio.to_thread(call_back, "a callback", call.take, message)
        except grpc.RpcError as error:
            return read_failure(error)
        return None


class Trainer(Position, Client):
    """Drives one run; see `maskwire.client.Trainer`. Made by `connect`; leaving `async with` closes it.

    A step whose awaiting task is cancelled stays in flight, and the next one has the next number.
    """

    def __init__(self, door: Door, talk: Writing) -> None:
        super().__init__(door, talk)
        self._writing = talk
        self._running: set[asyncio.Task[Any]] = set()

    async def train_step(self, tokens: Any, **options: Unpack[StepOptions]) -> results.StepResult:
        """Train on one batch; it is durable then."""
        return await (await self.submit(tokens, **options))

    async def submit(
        self, tokens: Any, *, step: int | None = None, **options: Unpack[StepOptions]
    ) -> asyncio.Future[results.StepResult]:
        """Hand in one batch and return a future of its result; waits as `maskwire.Trainer.submit` blocks."""
        self._enter()
        num_tokens = self._writing.model.num_tokens
        talk = self._writing.train(codec.step_request(new_id(), tokens, num_tokens, **options), step)
        try:
            effect = self._advance(talk, None)
            while isinstance(effect, Until):
                effect = self._advance(talk, await self._do(effect))
        except BaseException:
            self._end(talk)
            raise
        # Once sent it may be applied, and only its answer tells: who stops waiting leaves it in flight.
        return self._apart(self._drive(talk, effect))

    async def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        """Go back to a checkpoint, on a new lineage, and go on from there as its writer."""
        # Apart, so that a cancellation leaves no trainer behind whose session a restore has used up.
        return await self._apart(self._drive(self._writing.restore(name, expected_step)))

    def _apart(self, driven: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Have a conversation go on whatever becomes of who waits for it."""
        task = asyncio.create_task(driven)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return asyncio.shield(task)

    async def settle(self) -> None:
        """Wait until no step is in flight; whether they were refused, their futures tell."""
        await self._drive(self._writing.settle())

    async def use_tokenizer(self, tokenizer: str) -> None:
        """Keep with the run what its ids stand for."""
        await self._drive(self._writing.use_tokenizer(tokenizer))

    async def use_data(self, fingerprint: Mapping[str, str], *, allow_changed: bool = False) -> None:
        """Keep with the run the fingerprint of its data, as `maskwire.client.Trainer.use_data`."""
        await self._drive(self._writing.use_data(fingerprint, allow_changed=allow_changed))

    async def mark_evaluated(self) -> None:
        """Keep with the run that the present step is evaluated, and the result seen; `fit` does it."""
        await self._drive(self._writing.mark_evaluated())

    async def fit(self, data: Any, *, until_step: int, **options: Any) -> FitResult:
        """Train on `data.batch(step)` up to an absolute step; `maskwire.protocol.fit.plan` has the options.

        `evaluate` may be a coroutine function here. Cancelled (as `asyncio.run` does at Ctrl-C), it
        ends at once and leaves the steps in flight to `close`; the next call goes on.
        """
        from maskwire.protocol.fit import Apart, Take, plan

        wishes = plan(self, data, until_step=until_step, **options)
        reply: Any = None
        raised: BaseException | None = None
        try:
            while True:
                wish = wishes.send(reply) if raised is None else wishes.throw(raised)
                reply = raised = None
                try:
                    if isinstance(wish, Take):
                        self._check_process()
                        reply = await asyncio.wait_for(wish.future, wish.timeout)
                    elif isinstance(wish, Apart):
                        reply = await asyncio.to_thread(wish.act)
                    elif inspect.isawaitable(reply := wish()):
                        reply = await reply
                except BaseException as error:
                    raised = error
        except StopIteration as done:
            result: FitResult = done.value
            return result

    async def close(self, grace: float | None = None) -> None:
        """End the session and the connection; steps in flight are waited for, at most `grace` seconds."""
        await self._close(grace, patient=True)

    async def _close(self, grace: float | None, *, patient: bool) -> None:
        """End the session and the connection; unless `patient`, a server out of reach is not waited for."""
        if self._inherited or self._writing.closed:
            return
        self._enter()
        self._writing.closed = True
        self._wake()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled(patient=patient), grace)
            farewell = self._writing.farewell()
            if farewell is not None:
                await self._stub.CloseSession(farewell, timeout=CLOSE_TIMEOUT, metadata=self._metadata)
        except grpc.RpcError:
            log.debug("the session was not closed; it ends by itself when idle", exc_info=True)
        finally:
            self._closed = True
            for task in self._running:  # what is left after `grace`
                task.cancel()
            await self._channel.close()

    async def _settled(self, *, patient: bool) -> None:
        writing = self._writing
        await self._do(Until(lambda: not writing.in_flight or (writing.out_of_reach and not patient)))
        if self._running and (patient or not writing.out_of_reach):
            await asyncio.wait(self._running)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            # The traceback must not wait for a server that may be gone. Ctrl-C and timeouts cancel: fit
            # leaves its steps to this, so they get longer as long as the server answers.
            await self._close(EXIT_GRACE if issubclass(kind, Exception) else LEAVE_SECONDS, patient=False)
