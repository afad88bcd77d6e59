"""The configuration as a commented TOML file, made from the configuration's own fields."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from maskwire_server.config import Config

_HEAD = """\
# maskwire-server configuration. Every setting is here with its default, commented out.
# Each can also be set in the environment, MASKWIRE_SECTION__KEY, which wins over this file,
# and flags win over both.
"""


def template() -> str:
    """The file's text; as it stands it loads as the defaults."""
    sections = [_HEAD]
    for name, field in Config.model_fields.items():
        section = field.default
        doc = (type(section).__doc__ or "").strip().partition(": ")[2]
        lines = [f"[{name}]", *_comment(doc[:1].upper() + doc[1:]), ""]
        for key, setting in type(section).model_fields.items():
            lines += _comment(setting.description or "")
            value = getattr(section, key)
            lines += [f"# {key} = {toml(value)}" if value is not None else f"# {key} =   (not set)", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 96)]


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(toml(item) for item in value)}]"
    return str(value)
