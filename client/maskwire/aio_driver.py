"""The asyncio driver: performs the effects of operations in an event loop.

An operation is a generator that yields effects, such as calls to the server; see `maskwire.protocol.effects`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.aio

from maskwire.arguments import call_back
from maskwire.credentials import Endpoint
from maskwire.errors import EventLoopError, MaskwireError, closed_meanwhile, read_failure
from maskwire.process_bound import ProcessBound
from maskwire.protocol.effects import (
    Call,
    Effect,
    Emit,
    Notify,
    Operation,
    Pause,
    Receive,
    Stream,
    Until,
    Work,
    end_operation,
)
from maskwire.protocol.sessionless_calls import Calls
from maskwire.signatures import keep_signature
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

P = ParamSpec("P")
T = TypeVar("T")


class Driver(ProcessBound):
    """A connection to a server, and the code that performs operations over it.

    It belongs to the first event loop that uses it.
    """

    def __init__(self, endpoint: Endpoint, calls: Calls) -> None:
        super().__init__()
        self.target = endpoint.target
        self._calls = calls
        self._endpoint = endpoint
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: Any = None  # made in the loop, since gRPC binds it to the loop
        self._stub: Any = None
        self._closed = False
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def _enter(self) -> None:
        """Connect on the first call. Raises EventLoopError if a later call is in another event loop."""
        self._check_process()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._channel = self._endpoint.channel(grpc.aio)
            self._stub = pb_grpc.TrainingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        elif loop is not self._loop:
            state = "which has ended" if self._loop.is_closed() else "which still runs"
            raise EventLoopError(
                f"this {type(self).__name__} belongs to the event loop that used it first, {state}, and "
                "gRPC cannot move it to another loop: make a client in each loop with maskwire.aio.attach or "
                "maskwire.aio.connect, or make all calls in one asyncio.run",
                reason="OTHER_EVENT_LOOP",
            )

    async def _drive(self, operation: Operation[T]) -> T:
        """Perform the effects that an operation yields, and return the result of the operation."""
        self._enter()
        effect: Effect | None = None
        try:
            while True:
                reply = None if effect is None else await self._perform(effect)
                try:
                    effect = self._advance(operation, reply)
                except StopIteration as done:
                    value: T = done.value
                    return value
        except Exception as error:
            self._end(operation, effect, error)
            raise
        except BaseException:
            self._end(operation, effect)
            raise

    async def _iterate(self, operation: Operation[Any]) -> AsyncIterator[Any]:
        """Perform an operation, and yield the values that it emits."""
        self._enter()
        effect: Effect | None = None
        stream: Receive | None = None
        try:
            while True:
                reply = None if effect is None else await self._perform(effect)
                try:
                    effect = self._advance(operation, reply)
                except StopIteration:
                    return
                if isinstance(effect, Receive):
                    stream = effect
                elif isinstance(effect, Emit):
                    yield effect.value
        finally:
            self._end(operation, stream)

    def _advance(self, operation: Operation[Any], reply: Any) -> Effect:
        """Send `reply` to an operation, run it up to its next effect, and return that effect."""
        self._check_process()  # a callback, or the reader of an iterator, may have forked
        try:
            return operation.send(reply)
        finally:
            self._wake()

    async def _wait(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()` is true. Raises UnavailableError if the client is closed before."""
        while not holds():
            if self._closed:
                raise closed_meanwhile(self.target)
            waiter = holds, asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter[1]
            finally:
                self._waiting.remove(waiter)

    def _wake(self) -> None:
        """Wake each waiting task whose condition now holds; if the client is closed, wake all of them."""
        for holds, future in self._waiting:
            if not future.done() and (self._closed or holds()):
                future.set_result(None)

    def _end(
        self, operation: Operation[Any], effect: Effect | None = None, error: Exception | None = None
    ) -> None:
        """End an operation before it returns, and cancel the stream that `effect` receives from, if any.

        `error` is what the last effect raised; None if the operation was interrupted or abandoned. In a
        forked child this does nothing, because the operation belongs to the parent.
        """
        if self._inherited:
            return
        end_operation(operation, error)
        self._wake()
        if isinstance(effect, Receive):
            effect.stream.cancel()

    async def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Call):
            return await self._call(effect)
        if isinstance(effect, Until):
            return await self._wait(effect.holds)
        if isinstance(effect, Pause):
            return await asyncio.sleep(effect.seconds)
        if isinstance(effect, Work):
            return await asyncio.to_thread(call_back, "a callback", effect.function)
        if isinstance(effect, Notify):
            return call_back("a callback", effect.function)
        if isinstance(effect, Receive):
            return await self._receive(effect.stream)
        return None  # Emit is handled by _iterate

    async def _call(self, call: Call) -> Any:
        self._check_open()
        try:
            answer = getattr(self._stub, call.method)(
                call.request, timeout=call.timeout, metadata=(*self._endpoint.metadata, *call.headers)
            )
            if call.meanwhile is not None:
                asyncio.get_running_loop().call_soon(
                    call.meanwhile
                )  # runs after gRPC's task has sent the call
            if call.on_message is None:
                return await answer
            async for message in answer:
                await asyncio.to_thread(call_back, "a callback", call.on_message, message)
        except grpc.RpcError as error:
            return read_failure(error)
        return None

    async def _receive(self, stream: Stream) -> Any:
        self._check_open()
        try:
            if stream.call is None:
                method = getattr(self._stub, stream.method)
                stream.call = method(stream.request, timeout=stream.timeout, metadata=self._endpoint.metadata)
            message = await stream.call.read()
        except grpc.RpcError as error:
            return read_failure(error)
        return None if message is grpc.aio.EOF else message

    def _check_open(self) -> None:
        if self._closed:
            raise MaskwireError("this client is closed and accepts no more calls; make a new client")


def awaited(
    method: Callable[Concatenate[Any, P], Operation[T]],
) -> Callable[Concatenate[Driver, P], Coroutine[Any, Any, T]]:
    """Turn a method that makes an operation into a coroutine method with the same signature and docstring."""

    @keep_signature(method)
    async def call(self: Driver, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._drive(method(self._calls, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[Any, P], Generator[Effect, Any, T | None]],
) -> Callable[Concatenate[Driver, P], AsyncIterator[T]]:
    """Turn a method whose operation emits values into one that returns an asynchronous iterator over them."""

    @keep_signature(method)
    def call(self: Driver, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self._iterate(method(self._calls, *args, **kwargs))

    return call
