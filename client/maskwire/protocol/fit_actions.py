"""What a training loop asks its driver to do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from maskwire.protocol.effects import Work

T = TypeVar("T")


@dataclass(frozen=True)
class ResultOf:
    """An action: wait for the result of a step in flight, for at most `timeout` seconds."""

    future: Any
    timeout: float | None


# A plain callable is called, and its result awaited if it is awaitable.
Action = ResultOf | Work | Callable[[], Any]
Fitting = Generator[Action, Any, T]
