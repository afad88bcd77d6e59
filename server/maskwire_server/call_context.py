"""The call that the current thread works for, so that logs and traces can name it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallContext:
    """What identifies a call."""

    number: int
    """Counts the calls of this process."""
    request_id: str = ""
    """Empty: the request has none."""


current: ContextVar[CallContext | None] = ContextVar("current", default=None)
"""None: the thread works for no call."""
