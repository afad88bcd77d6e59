"""The call that the current thread works on, so that logs and traces can name it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallContext:
    """What identifies a call."""

    number: int
    """The number of the call, counted per process."""
    request_id: str = ""
    """Empty: the request has none."""


current: ContextVar[CallContext | None] = ContextVar("current", default=None)
"""None: the thread works on no call."""
