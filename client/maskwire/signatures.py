"""Gives a method of both clients one signature and one docstring."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from maskwire.arguments import check_options

F = TypeVar("F", bound=Callable[..., Any])


def keep_signature(source: Callable[..., Any]) -> Callable[[F], F]:
    """Give a function the name, docstring and parameters of another one.

    The function keeps its own return annotation, in which `T` stands for what the operation `source` returns.
    """

    def decorate(function: F) -> F:
        returns = function.__annotations__["return"]
        if inspect.isgeneratorfunction(source):
            returns = re.sub(r"\bT\b", _result(source), returns)
        functools.update_wrapper(function, source, assigned=("__name__", "__qualname__", "__doc__"))
        del function.__wrapped__  # type: ignore[attr-defined]
        function.__annotations__ = {**source.__annotations__, "return": returns}
        function.__signature__ = inspect.signature(source).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


def check_keywords(source: Callable[..., Any]) -> Callable[[Iterable[str]], None]:
    """Return a check of a call's keywords that names the argument that was probably meant.

    An operation with options of its own (`**options`) checks them itself.
    """
    parameters = inspect.signature(source).parameters.values()
    known = [one.name for one in parameters if one.name != "self"]
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return lambda given: None  # noqa: ARG005
    return lambda given: check_options(source.__name__, given, known)


def _result(operation: Callable[..., Any]) -> str:
    """X of an operation whose annotation is `Operation[X]`, or `Operation[X | None]` for an iterator."""
    annotation: str = operation.__annotations__["return"]
    return annotation.partition("[")[2].removesuffix("]").removesuffix(" | None")
