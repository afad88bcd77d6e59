"""Decorators of public calls: they refuse unknown keywords, and copy signatures and docstrings."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from maskwire.arguments import check_options

F = TypeVar("F", bound=Callable[..., Any])


def refuse_unknown_keywords(target: F) -> F:
    """Decorate a function, or a class's public methods, to raise TypeError for an unknown keyword.

    The error names the argument that was probably meant. Python's own TypeError does so only in newer
    versions, and never for `**options`.
    """
    if not inspect.isclass(target):
        return _checked(target, target)
    for name, member in list(vars(target).items()):
        public = name == "__init__" or not name.startswith("_")
        if public and inspect.isfunction(member) and not hasattr(member, "__signature__"):
            setattr(target, name, _checked(member, member))
    return target


def keep_signature(source: Callable[..., Any]) -> Callable[[F], F]:
    """Return a decorator that gives a function the name, docstring and parameters of `source`.

    The function then refuses other keywords. It keeps its own return annotation, in which `T` stands for the
    result of the operation `source`.
    """

    def decorate(function: F) -> F:
        returns = function.__annotations__["return"]
        if inspect.isgeneratorfunction(source):
            returns = re.sub(r"\bT\b", _result(source), returns)
        made = _checked(function, source)
        for name in ("__name__", "__qualname__", "__doc__"):
            setattr(made, name, getattr(source, name))
        made.__annotations__ = {**source.__annotations__, "return": returns}
        made.__signature__ = inspect.signature(source).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return made

    return decorate


def _checked(function: F, source: Callable[..., Any]) -> F:
    """Return a function that checks its keywords against `source`'s parameters, then calls `function`."""
    check = _check_of(source, method=next(iter(inspect.signature(function).parameters), "") == "self")
    made: Any
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def made(*args: Any, **kwargs: Any) -> Any:
            check(args, kwargs)
            return await function(*args, **kwargs)

    else:

        @functools.wraps(function)
        def made(*args: Any, **kwargs: Any) -> Any:
            check(args, kwargs)
            return function(*args, **kwargs)

    return made  # type: ignore[no-any-return]


def _check_of(
    source: Callable[..., Any], *, method: bool
) -> Callable[[tuple[Any, ...], Iterable[str]], None]:
    """Return a function that raises TypeError for keywords which are no parameters of `source`.

    If `method` is True, the first parameter is `self`. For a `source` with untyped options (`**options: Any`)
    the returned function does nothing, because `source` checks its options itself.
    """
    known: list[str] = []
    for one in list(inspect.signature(source).parameters.values())[method:]:
        if one.kind is one.VAR_KEYWORD:
            options = re.fullmatch(r"Unpack\[(\w+)\]", str(one.annotation))
            if options is None:
                return lambda args, given: None  # noqa: ARG005
            known += inspect.unwrap(source).__globals__[options[1]].__annotations__
        elif one.kind is not one.VAR_POSITIONAL:
            known.append(one.name)

    def check(args: tuple[Any, ...], given: Iterable[str]) -> None:
        if given:
            name = type(args[0]).__name__ if source.__name__ == "__init__" else source.__name__
            check_options(name, given, known)

    return check


def _result(operation: Callable[..., Any]) -> str:
    """Return the text X in an operation's annotation `Operation[X]`, or `Operation[X | None]`."""
    annotation: str = operation.__annotations__["return"]
    return annotation.partition("[")[2].removesuffix("]").removesuffix(" | None")
