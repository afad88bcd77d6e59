"""Error messages for settings: the key, what would be right, and the value."""

from __future__ import annotations

from pydantic_core import ErrorDetails

from maskwire_server.config.base import OFF
from maskwire_server.config.sections import ENTRIES, SECTIONS, can_be_off

_OFF_ELSEWHERE = ("0", "0.0", "off", "none", "null", "false", "")
"""What other programs accept for "off"."""


def message(problem: ErrorDetails) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if value == OFF:
        optional = _is_optional(problem["loc"])
        instead = "leave it out for none or the automatic choice" if optional else "give it a value"
        return f"{key}: cannot be off: {instead}; what can be off is {', '.join(can_be_off())}, got 'off'"
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
    """Whether a setting can be left out. An entry of a list is followed by its own settings."""
    section, *names = where
    fields = SECTIONS[str(section)].model_fields if section in SECTIONS else {}
    if names[1:]:
        fields = ENTRIES[f"{section}.{names[0]}"].model_fields
    return bool(names) and names[-1] in fields and fields[str(names[-1])].default is None
