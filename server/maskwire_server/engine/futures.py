"""Answers for whoever waits: a future that was cancelled meanwhile takes none."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def answer(future: Future[T], value: T) -> None:
    """Give a result to whoever still waits for it."""
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def refuse(future: Future[Any], error: BaseException) -> None:
    """Give an error to whoever still waits."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
