"""The gRPC call that the current thread works on, so that logs and traces can name it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallContext:
    """The number and the request id of a gRPC call, which identify it."""

    number: int
    """The number of the call, counted from the start of the process."""
    request_id: str = ""
    """The id that the client gave the request; empty if it gave none."""


current: ContextVar[CallContext | None] = ContextVar("current", default=None)
"""The call; None if the thread works on none."""
