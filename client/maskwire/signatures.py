"""One signature and one docstring for the same method of both clients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def keep_signature(source: Callable[..., Any]) -> Callable[[F], F]:
    """Give a function the name, docstring and parameters of another one."""

    def decorate(function: F) -> F:
        functools.update_wrapper(function, source)
        del function.__wrapped__  # type: ignore[attr-defined]
        signature = inspect.signature(source)
        function.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
        return function

    return decorate
