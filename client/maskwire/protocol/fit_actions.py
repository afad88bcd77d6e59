"""The actions that a training loop, which is a generator, yields to the client that runs it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from maskwire.protocol.effects import Work

T = TypeVar("T")


@dataclass(frozen=True)
class ResultOf:
    """Action: wait for a step in flight, for at most `timeout` seconds. The outcome is the step's result."""

    future: Any
    timeout: float | None


# The driver calls a plain callable, and awaits its result if that is awaitable.
Action = ResultOf | Work | Callable[[], Any]
Fitting = Generator[Action, Any, T]
