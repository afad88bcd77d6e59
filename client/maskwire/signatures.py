"""Public calls: errors for unknown keywords, and one signature and docstring for a method of both clients."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from maskwire.arguments import check_options

F = TypeVar("F", bound=Callable[..., Any])


def refuse_unknown_keywords(target: F) -> F:
    """Make a function, or a class with its public methods, name the argument that was probably meant.

    Python's own TypeError does so only in newer versions, and not for `**options`.
    """
    if not inspect.isclass(target):
        return _checked(target, target)
    for name, member in list(vars(target).items()):
        public = name == "__init__" or not name.startswith("_")
        if public and inspect.isfunction(member) and not hasattr(member, "__signature__"):
            setattr(target, name, _checked(member, member))
    return target


def keep_signature(source: Callable[..., Any]) -> Callable[[F], F]:
    """Give a function the name, docstring and parameters of another one, and refuse other keywords.

    The function keeps its own return annotation, in which `T` stands for what the operation `source` returns.
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
    """Return the function with a check of its keywords against the parameters of `source`."""
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
    """Return a check of a call's arguments. `method`: the first parameter is the object.

    A call with untyped options (`**options: Any`) checks them itself.
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
    """X of an operation whose annotation is `Operation[X]`, or `Operation[X | None]` for an iterator."""
    annotation: str = operation.__annotations__["return"]
    return annotation.partition("[")[2].removesuffix("]").removesuffix(" | None")
