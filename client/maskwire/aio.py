"""The asyncio client: the calls of `maskwire.client` as coroutines, over the same protocol.

async with await maskwire.aio.connect("127.0.0.1:50051") as trainer:
    result = await trainer.train_step(tokens)
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import grpc

from maskwire import client, results
from maskwire.aio_driver import Driver, awaited, iterating
from maskwire.arguments import check_function
from maskwire.client import CLOSE_TIMEOUT, EXIT_GRACE
from maskwire.credentials import CredentialOptions, Endpoint
from maskwire.errors import closed_meanwhile
from maskwire.protocol.effects import Operation, Work
from maskwire.protocol.fit import Fitting, ResultOf
from maskwire.protocol.fit import fit as training_loop
from maskwire.protocol.option_types import StepOptions
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.sessionless_calls import Calls
from maskwire.protocol.trainer_properties import TrainerProperties
from maskwire.protocol.writer import Writer
from maskwire.signatures import keep_signature, refuse_unknown_keywords
from maskwire.step_spans import step_spans

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

CANCEL_GRACE = 10.0  # seconds for the steps in flight when a cancellation leaves the `async with` block


@keep_signature(client.connect)
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
    **credentials: Unpack[CredentialOptions],
) -> Trainer:
    check_function("on_takeover", on_takeover)
    writer = Writer(
        target,
        RetryPolicy(retry_for, timeout),
        on_wait or log.warning,
        time.monotonic,
        name,
        window,
        step_spans(target),
    )
    trainer = Trainer(Endpoint.of(target, **credentials), writer)
    try:
        await trainer._drive(writer.open(takeover=takeover))
        if writer.takeover_message:
            (on_takeover or log.warning)(writer.takeover_message)
    except BaseException:
        await trainer.close()
        raise
    return trainer


@keep_signature(client.attach)
def attach(
    target: str,
    *,
    retry_for: float = 300.0,
    timeout: float = 60.0,
    on_wait: Callable[[str], None] | None = None,
    **credentials: Unpack[CredentialOptions],
) -> Client:
    calls = Calls(target, RetryPolicy(retry_for, timeout), on_wait or log.warning, time.monotonic)
    return Client(Endpoint.of(target, **credentials), calls)


@refuse_unknown_keywords
class Client(Driver):
    """The asyncio client for the calls that need no session, made by `attach`.

    It may be made before an event loop runs, and belongs to the first event loop that uses it. Its calls
    raise EventLoopError in another loop, and ForkError in a forked child process.
    """

    eval_loss = awaited(Calls.eval_loss)
    evaluate = awaited(Calls.evaluate)
    generate = awaited(Calls.generate)
    generate_steps = iterating(Calls.generate_steps)
    checkpoint = awaited(Calls.checkpoint)
    checkpoints = awaited(Calls.checkpoints)
    list_steps = iterating(Calls.list_steps)
    steps_page = awaited(Calls.steps_page)
    delete = awaited(Calls.delete)
    restore = awaited(Calls.restore)
    download = awaited(Calls.download)
    tokenizer_of_run = awaited(Calls.tokenizer_of_run)
    status = awaited(Calls.status)

    @keep_signature(client.Client.close)
    async def close(self) -> None:
        if self._inherited or self._loop is None:
            self._closed = True
            return
        self._enter()
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _fitting(
    method: Callable[Concatenate[Any, P], Fitting[T]],
) -> Callable[Concatenate[Trainer, P], Coroutine[Any, Any, T]]:
    """Turn a training loop, a generator of actions, into a coroutine method that performs them."""

    @keep_signature(method)
    async def call(self: Trainer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run_fit(method(self, *args, **kwargs))

    return call


@refuse_unknown_keywords
class Trainer(TrainerProperties, Client):
    """The asyncio client that trains one run, made by `connect`. Leaving its `async with` block closes it.

    If a task is cancelled while it awaits the result of a step, the step stays in flight, and the next step
    gets the next number.
    """

    def __init__(self, endpoint: Endpoint, writer: Writer) -> None:
        super().__init__(endpoint, writer)
        self._writer: Writer = writer
        self._running: set[asyncio.Task[Any]] = set()

    settle = awaited(Writer.settle)
    use_tokenizer = awaited(Writer.use_tokenizer)
    keep_tokenizer = awaited(Writer.keep_tokenizer)
    use_data = awaited(Writer.use_data)
    mark_evaluated = awaited(Writer.mark_evaluated)
    fit = _fitting(training_loop)

    @keep_signature(Writer.restore)
    async def restore(self, name: str, *, expected_step: int | None = None) -> results.RestoreResult:
        # A cancelled restore must not leave the trainer without a session.
        return await self._start(self._writer.restore(name, expected_step=expected_step))

    @keep_signature(client.Trainer.train_step)
    async def train_step(self, tokens: Any = None, **options: Unpack[StepOptions]) -> results.StepResult:
        return await (await self.submit(tokens, **options))

    @keep_signature(client.Trainer.submit)
    async def submit(
        self, tokens: Any = None, *, step: int | None = None, **options: Unpack[StepOptions]
    ) -> asyncio.Future[results.StepResult]:
        self._enter()
        pending = self._writer.new_step(tokens, step, **options)
        try:
            await self._drive(self._writer.enter(pending))
        except BaseException:
            self._writer.withdraw(pending)
            self._wake()
            raise
        return self._start(self._writer.finish(pending))

    @keep_signature(client.Trainer.close)
    async def close(self, grace: float | None = None) -> None:
        await self._close(grace, patient=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            # After an exception, wait only briefly: the server may be down. Ctrl-C and timeouts cancel
            # the task, and `fit` then leaves its steps in flight to this method: wait longer for those
            # steps while the server answers.
            await self._close(EXIT_GRACE if issubclass(kind, Exception) else CANCEL_GRACE, patient=False)

    async def _close(self, grace: float | None, *, patient: bool) -> None:
        """Wait for the steps in flight, at most `grace` seconds; then end the session and the connection.

        If the server is unreachable, the steps are awaited only if `patient`.
        """
        if self._inherited or self._writer.closed:
            return
        self._enter()
        self._writer.closed = True
        self._wake()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled(patient=patient), grace)
            if (request := self._writer.close_request()) is not None:
                await self._stub.CloseSession(
                    request, timeout=CLOSE_TIMEOUT, metadata=self._endpoint.metadata
                )
        except grpc.RpcError:
            log.debug("the session was not closed; it ends by itself when idle", exc_info=True)
        finally:
            self._closed = True
            self._wake()
            for task in self._running:  # those left after `grace`
                task.cancel()
            await self._channel.close()

    async def _settled(self, *, patient: bool) -> None:
        writer = self._writer
        await self._wait(lambda: not writer.in_flight or (writer.unreachable and not patient))
        if self._running and (patient or not writer.unreachable):
            await asyncio.wait(self._running)

    def _start(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Perform an operation in a task that continues if the caller is cancelled; return its future."""
        task = asyncio.create_task(self._finish(operation))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        answer = asyncio.shield(task)
        answer.add_done_callback(self._forget_if_closed)
        return answer

    def _forget_if_closed(self, answer: asyncio.Future[Any]) -> None:
        """Once the client is closed, keep asyncio from logging an error of `answer` as never retrieved."""
        if self._closed and not answer.cancelled():
            answer.exception()

    async def _finish(self, operation: Operation[T]) -> T:
        """Perform an operation and return its result. Raises UnavailableError if `close` cancels it."""
        try:
            return await self._drive(operation)
        except asyncio.CancelledError:
            if self._closed:
                raise closed_meanwhile(self.target) from None
            raise

    async def _run_fit(self, fitting: Fitting[T]) -> T:
        """Perform the actions that a training loop yields, and return the result of the loop."""
        reply: Any = None
        raised: BaseException | None = None
        while True:
            try:
                action = fitting.send(reply) if raised is None else fitting.throw(raised)
            except StopIteration as done:
                value: T = done.value
                return value
            reply = raised = None
            try:
                if isinstance(action, ResultOf):
                    self._check_process()
                    reply = await asyncio.wait_for(action.future, action.timeout)
                elif isinstance(action, Work):
                    reply = await asyncio.to_thread(action.function)
                elif inspect.isawaitable(reply := action()):
                    reply = await reply
            except BaseException as error:
                raised = error
