"""Effects: the actions that the protocol asks its driver to perform.

The protocol does no I/O. Each call of the client is an operation: a generator that yields effects, receives
the outcome of each, and returns the call's result. The blocking and the asyncio client differ only in how
their drivers perform effects. A driver switches to another operation only at an effect, so the protocol
needs no locks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Effect: call a method of the service. The outcome is the response, or a `Failure`."""

    method: str
    request: Any
    timeout: float
    on_message: Callable[[Any], None] | None = None
    """For a streaming method: a function that is called with each message; the outcome is then None."""
    meanwhile: Callable[[], object] | None = None
    """A function to run while the request is in flight, because it does not need the response."""
    headers: tuple[tuple[str, str], ...] = ()
    """Metadata of this call, in addition to the metadata of every call."""


@dataclass(eq=False)
class Stream:
    """A streaming call whose messages are read one at a time with `Receive`."""

    method: str
    request: Any
    timeout: float
    call: Any = None
    """The driver's gRPC call; None until the first `Receive` starts it."""

    def cancel(self) -> None:
        """End the call, if it was started: the server then sends no further message."""
        if self.call is not None:
            self.call.cancel()


@dataclass(frozen=True)
class Receive:
    """Effect: read a stream's next message. The outcome is the message, None at the end, or a `Failure`."""

    stream: Stream


@dataclass(frozen=True)
class Emit:
    """Effect: pass a value to the caller, who iterates over the operation's values."""

    value: Any


@dataclass(frozen=True)
class Pause:
    """Effect: wait for a number of seconds."""

    seconds: float


@dataclass(frozen=True)
class Until:
    """Effect: wait until a condition holds, which other operations make true."""

    holds: Callable[[], bool]


@dataclass(frozen=True)
class Work:
    """Effect: run a slow function while other operations continue. The outcome is the function's result."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Notify:
    """Effect: call a short function that the user passed in and that may use the client."""

    function: Callable[[], object]


Effect = Call | Receive | Emit | Pause | Work | Notify | Until
Operation = Generator[Effect, Any, T]
"""A generator that yields effects and returns a call's result."""


def end_operation(operation: Operation[object], error: Exception | None) -> None:
    """End an operation early: raise `error` in it, then close it.

    error: The error that the operation's last effect raised; None: it was interrupted or abandoned.
    """
    if error is not None and inspect.getgeneratorstate(operation) == inspect.GEN_SUSPENDED:
        with contextlib.suppress(Exception):  # the driver raises it
            operation.throw(error)
    operation.close()
