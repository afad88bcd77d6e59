"""The configuration as a commented TOML file, made from the configuration's own fields."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from maskwire_server.config.base import CAN_BE_OFF, OFF
from maskwire_server.config.config import Config

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
            value = _said(section, key)
            lines += [f"# {key} = {toml(value)}" if value is not None else f"# {key} =   (not set)", ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def written(config: Config) -> str:
    """A configuration as a file that loads as it: the run's own sections whole, of the others what is set."""
    sections = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        values = {key: _said(section, key) for key in type(section).model_fields}
        if name not in ("model", "objective"):
            values = {key: value for key, value in values.items() if key in section.model_fields_set}
        lines = [f"{key} = {toml(value)}" for key, value in values.items() if value is not None]
        if lines:
            sections.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(sections)


def _said(section: Any, key: str) -> Any:
    """A setting's value as a file says it; None where it has to be left out."""
    value = getattr(section, key)
    return OFF if value is None and CAN_BE_OFF in type(section).model_fields[key].metadata else value


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 96)]


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        # TOML's basic strings escape as JSON's do, and DEL too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(toml(item) for item in value)}]"
    return str(value)
