"""Setters for futures that several threads may set: the first result wins. Cancelled futures get none."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_claiming = threading.Lock()


def answer(future: Future[T], value: T) -> None:
    """Set a result, unless the future is done or cancelled."""
    if _claim(future):
        future.set_result(value)


def refuse(future: Future[Any], error: BaseException) -> None:
    """Set an exception, unless the future is done or cancelled."""
    if _claim(future):
        future.set_exception(error)


def _claim(future: Future[Any]) -> bool:
    with _claiming:
        return not (future.done() or future.running()) and future.set_running_or_notify_cancel()
