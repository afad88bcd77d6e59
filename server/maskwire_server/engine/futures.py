"""Answers for whoever waits: the first one counts, and a future that was cancelled meanwhile takes none."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_claiming = threading.Lock()


def answer(future: Future[T], value: T) -> None:
    """Give a result, unless somebody has answered before or nobody waits."""
    if _claim(future):
        future.set_result(value)


def refuse(future: Future[Any], error: BaseException) -> None:
    """Give an error, unless somebody has answered before or nobody waits."""
    if _claim(future):
        future.set_exception(error)


def _claim(future: Future[Any]) -> bool:
    with _claiming:
        return not (future.done() or future.running()) and future.set_running_or_notify_cancel()
