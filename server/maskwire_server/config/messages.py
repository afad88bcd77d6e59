"""Error messages for settings: the key, what is allowed, and the value that was given."""

from __future__ import annotations

from typing import get_args

from pydantic_core import ErrorDetails

from maskwire_server.config.base import OFF, Section
from maskwire_server.config.sections import SECTIONS, can_be_off

_OFF_ELSEWHERE = ("0", "0.0", "off", "none", "null", "false", "")
"""Values that other programs accept instead of "off"."""


def message(problem: ErrorDetails) -> str:
    """Return the message, one line, for one of pydantic's validation errors."""
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if value == OFF:
        optional = _is_optional(problem["loc"])
        instead = "leave it out for its default" if optional else "give it a value"
        return (
            f"{key}: cannot be off: {instead}, got 'off'; settings that can be off: {', '.join(can_be_off())}"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if problem["type"] == "missing":
        return f"{key}: must be set"
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if "got" in text:
        return f"{key}: {text}"
    off = str(value).lower() in _OFF_ELSEWHERE and key in can_be_off()
    hint = '; "off" turns it off' if off else ""
    return f"{key}: {text[0].lower()}{text[1:]}{hint}, got {value!r}"


def _is_optional(where: tuple[int | str, ...]) -> bool:
    """Whether a setting can be left out. `where` is its path, also through tables and lists of tables."""
    kind = SECTIONS.get(str(where[0]))
    for name in where[1:-1]:
        if isinstance(name, str) and kind is not None:
            kind = _inner(kind, name)
    field = None if kind is None else kind.model_fields.get(str(where[-1]))
    return field is not None and field.default is None


def _inner(kind: type[Section], name: str) -> type[Section] | None:
    """The class of the table, or of the list of tables, in a setting; None if its value is not a table."""
    field = kind.model_fields.get(name)
    annotation = None if field is None else field.annotation
    found = (annotation, *get_args(annotation))
    return next((each for each in found if isinstance(each, type) and issubclass(each, Section)), None)
