"""The blocking driver: performs the effects of operations on the caller's thread.

An operation is a generator that yields effects, such as calls to the server; see `maskwire.protocol.effects`.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import grpc

from maskwire.arguments import call_back
from maskwire.credentials import Endpoint
from maskwire.errors import MaskwireError, closed_meanwhile, read_failure
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

# The system may deliver a signal to another thread, which does not wake the main thread. Only the main thread
# runs Python's signal handlers, so it wakes up at this interval.
_SIGNAL_SECONDS = 0.5


def result_of(future: Future[T], timeout: float | None = None) -> T:
    """Wait for a future's result; Ctrl-C interrupts the wait. Raises TimeoutError after `timeout` seconds.

    The wait is on a queue, which can be interrupted safely. If a wait on the future's Condition were
    interrupted, the Condition could stay locked, and the thread that sets the result would hang.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    done: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    future.add_done_callback(done.put)
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return done.get(timeout=min(_SIGNAL_SECONDS, left)).result()
        except queue.Empty:
            if not left:
                raise TimeoutError from None


_abandoned: list[grpc.Channel] = []
"""Channels that an interrupt may have left locked. They are kept until the process exits."""


class Driver(ProcessBound):
    """A connection to a server, and the code that performs operations over it. Several threads may use it.

    Python runs signal handlers on the main thread. An exception that a handler raises during a call, such as
    KeyboardInterrupt, can leave a lock of the gRPC channel held forever. The main thread therefore has its
    own channel, and abandons it after such a call. Channels to the same target share a connection.
    """

    def __init__(self, endpoint: Endpoint, calls: Calls) -> None:
        super().__init__()
        self.target = endpoint.target
        self._calls = calls
        self._endpoint = endpoint
        self._connections: dict[bool, tuple[grpc.Channel, Any]] = {}  # by whether it is the main thread's
        self._lock = threading.Lock()  # held while an operation runs between two effects
        self._waiting: dict[queue.SimpleQueue[None], Callable[[], bool]] = {}
        self._closed = threading.Event()
        self._background: Background | None = None  # runs `Call.meanwhile`

    def _drive(self, operation: Operation[T]) -> T:
        """Perform the effects that an operation yields, and return the result of the operation."""
        effect: Effect | None = None
        try:
            while True:
                reply = None if effect is None else self._perform(effect)
                try:
                    effect = self._advance(operation, effect, reply)
                except StopIteration as done:
                    value: T = done.value
                    return value
        except Exception as error:
            self._end(operation, effect, error)
            raise
        except BaseException:
            self._end(operation, effect)
            raise

    def _iterate(self, operation: Operation[Any]) -> Iterator[Any]:
        """Perform an operation, and yield the values that it emits."""
        effect: Effect | None = None
        stream: Receive | None = None
        try:
            while True:
                reply = None if effect is None else self._perform(effect)
                try:
                    effect = self._advance(operation, effect, reply)
                except StopIteration:
                    return
                if isinstance(effect, Receive):
                    stream = effect
                elif isinstance(effect, Emit):
                    yield effect.value
        finally:
            self._end(operation, stream)

    def _advance(self, operation: Operation[Any], effect: Effect | None, reply: Any) -> Effect:
        """Send an operation `reply`, the outcome of `effect`; return the effect that it yields next."""
        self._check_process()  # a callback, or the reader of an iterator, may have forked
        if isinstance(effect, Until):
            return cast(Effect, self._when(effect.holds, lambda: operation.send(reply)))
        with self._lock:
            try:
                return operation.send(reply)
            finally:
                self._wake()

    def _when(
        self, holds: Callable[[], bool], act: Callable[[], T], timeout: float | None = None
    ) -> T | None:
        """Wait until `holds()` is true, then call `act` with the lock held, and return its result.

        Returns None after `timeout` seconds. Raises UnavailableError if the client is closed before. The
        lock is not held while waiting, so that an interrupt cannot leave it in the wrong state.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            while True:
                with self._lock:
                    if holds():
                        self._waiting.pop(woken, None)
                        try:
                            return act()
                        finally:
                            self._wake()
                    self._waiting[woken] = holds
                if self._closed.is_set():
                    raise closed_meanwhile(self.target)
                left = min(_SIGNAL_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return None
                with contextlib.suppress(queue.Empty):
                    woken.get(timeout=left)
        finally:
            self._waiting.pop(woken, None)

    def _wake(self) -> None:
        """Wake each waiting thread whose condition now holds. The caller must hold the lock."""
        for woken, holds in list(self._waiting.items()):
            if holds():
                woken.put(None)

    @property
    def _stub(self) -> Any:
        """The gRPC stub for calls from the current thread."""
        main = threading.current_thread() is threading.main_thread()
        if main not in self._connections:
            channel = self._endpoint.channel()
            stub = pb_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
            self._connections.setdefault(main, (channel, stub))
        return self._connections[main][1]

    def _abandon_channel(self) -> None:
        """On the main thread, stop using its channel, because a call on the channel was interrupted."""
        if threading.current_thread() is threading.main_thread() and True in self._connections:
            _abandoned.append(self._connections.pop(True)[0])

    def _end(
        self, operation: Operation[Any], effect: Effect | None = None, error: Exception | None = None
    ) -> None:
        """End an operation before it returns, and cancel the stream that `effect` receives from, if any.

        `error` is what the last effect raised; None if the operation was interrupted or abandoned. In a
        forked child this does nothing, because the operation belongs to the parent.
        """
        if self._inherited:
            return
        with self._lock:
            end_operation(operation, error)
            self._wake()
        if isinstance(effect, Receive):
            effect.stream.cancel()

    def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Call):
            return self._call(effect)
        if isinstance(effect, Pause):
            return self._pause(effect.seconds)
        if isinstance(effect, Work | Notify):
            return call_back("a callback", effect.function)
        if isinstance(effect, Receive):
            return self._receive(effect.stream)
        return None  # Emit is handled by _iterate, Until by _advance

    def _call(self, call: Call) -> Any:
        self._check_open()
        if call.meanwhile is not None and self._background is not None:
            self._background.run(call.meanwhile)
        try:
            answer = getattr(self._stub, call.method)(
                call.request, timeout=call.timeout, metadata=(*self._endpoint.metadata, *call.headers)
            )
            if call.on_message is None:
                return answer
            for message in answer:
                call_back("a callback", call.on_message, message)
        except grpc.RpcError as error:
            return read_failure(error)
        except Exception:
            raise
        except BaseException:
            self._abandon_channel()
            raise
        return None

    def _receive(self, stream: Stream) -> Any:
        self._check_open()
        try:
            if stream.call is None:
                method = getattr(self._stub, stream.method)
                stream.call = method(stream.request, timeout=stream.timeout, metadata=self._endpoint.metadata)
            return next(stream.call, None)
        except grpc.RpcError as error:
            return read_failure(error)
        except Exception:
            raise
        except BaseException:
            self._abandon_channel()
            raise

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise closed_meanwhile(self.target)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise MaskwireError("this client is closed and accepts no more calls; make a new client")

    def _disconnect(self) -> None:
        """Close the connection, which ends the calls in progress."""
        self._closed.set()
        for channel, _ in list(self._connections.values()):
            channel.close()


class Background:
    """A thread that runs short functions one after another, and ignores their results."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # The thread references the queue and not this object, so that it ends when an unclosed client is
        # garbage-collected.
        threading.Thread(
            target=self._run, args=(self._queue,), name="maskwire-background", daemon=True
        ).start()

    def run(self, function: Callable[[], object]) -> None:
        """Queue a function for the thread, and return at once. The function's result is ignored."""
        self._queue.put(function)

    def __del__(self) -> None:
        self._queue.put(None)

    @staticmethod
    def _run(work: queue.SimpleQueue[Callable[[], object] | None]) -> None:
        while (function := work.get()) is not None:
            function()


def blocking(
    method: Callable[Concatenate[Any, P], Operation[T]],
) -> Callable[Concatenate[Driver, P], T]:
    """Turn a method that makes an operation into a blocking method with the same signature and docstring."""

    @keep_signature(method)
    def call(self: Driver, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._drive(method(self._calls, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[Any, P], Generator[Effect, Any, T | None]],
) -> Callable[Concatenate[Driver, P], Iterator[T]]:
    """Turn a method whose operation emits values into one that returns an iterator over them."""

    @keep_signature(method)
    def call(self: Driver, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(method(self._calls, *args, **kwargs))

    return call
