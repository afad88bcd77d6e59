"""Effects: what the protocol asks its driver to do.

The protocol does no I/O. Each call of the client is an operation: a generator that yields effects, is sent
the outcome of each, and returns the call's result. The blocking and the asyncio client differ only in how
their drivers perform effects. A driver runs one operation at a time between two effects, so the protocol
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
    """Call a method of the service. The outcome is the response, or a `Failure`."""

    method: str
    request: Any
    timeout: float
    on_message: Callable[[Any], None] | None = None
    """For a streaming method: called with each message; the outcome is then None."""
    meanwhile: Callable[[], object] | None = None
    """Work that does not need the response, to be done while the request is in flight."""
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
        """Notify the server that no further message is wanted."""
        if self.call is not None:
            self.call.cancel()


@dataclass(frozen=True)
class Receive:
    """Read a stream's next message. The outcome is the message, None at the end, or a `Failure`."""

    stream: Stream


@dataclass(frozen=True)
class Emit:
    """Hand a value to the caller, who iterates over the operation."""

    value: Any


@dataclass(frozen=True)
class Pause:
    """Wait this many seconds."""

    seconds: float


@dataclass(frozen=True)
class Until:
    """Wait until a condition holds. Other operations make it true."""

    holds: Callable[[], bool]


@dataclass(frozen=True)
class Work:
    """Run a function that takes time, while other operations continue. The outcome is its result."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Notify:
    """Call a short function of the user's, which may use the client."""

    function: Callable[[], object]


Effect = Call | Receive | Emit | Pause | Work | Notify | Until
Operation = Generator[Effect, Any, T]
"""A generator of effects that returns a call's result."""


def end_operation(operation: Operation[object], error: Exception | None) -> None:
    """End an operation early. `error`: raised by its last effect; None: interrupted or abandoned."""
    if error is not None and inspect.getgeneratorstate(operation) == inspect.GEN_SUSPENDED:
        with contextlib.suppress(Exception):  # the driver raises it
            operation.throw(error)
    operation.close()
