"""The configuration as a TOML file, generated from the sections."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskwire_server.config.base import CAN_BE_OFF, OFF, Section
from maskwire_server.config.config import Config
from maskwire_server.config.model import SHARED, TABLES

_HEAD = """\
# maskwire-server configuration: every setting. A line that is commented out shows a default.
# A setting can also be set in the environment as MASKWIRE_SECTION__KEY, which wins over this
# file. Flags win over both.
"""


def template(chosen: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return a commented file with every setting. Settings in `chosen` are set, all others commented out."""
    sections = [_HEAD]
    for name, field in Config.model_fields.items():
        section = field.default
        doc = (type(section).__doc__ or "").strip().partition(": ")[2]
        lines = [f"[{name}]", *_comment(doc[:1].upper() + doc[1:]), ""]
        for key, setting in type(section).model_fields.items():
            lines += _comment(setting.description or "")
            value = _written_value(section, key)
            line = f"# {key} = {toml(value)}" if value is not None else f"# {key} =   (not set)"
            if key in (chosen or {}).get(name, {}):
                line = f"{key} = {toml((chosen or {})[name][key])}"
            lines += [line, ""]
        sections.append("\n".join(lines))
    return "\n".join(sections)


def written(config: Config) -> str:
    """Return a TOML file that loads as this configuration.

    [model] and [objective] are written in full. Of the other sections, only settings that were set are
    written. The server sets model.weights_sha256 by itself, so it is left out.
    """
    sections = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        values = {key: _written_value(section, key) for key in type(section).model_fields}
        if name == "model":
            del values["weights_sha256"]
            if section.source != "encoder":
                values = {key: value for key, value in values.items() if key in SHARED | TABLES.keys()}
        elif name != "objective":
            values = {key: value for key, value in values.items() if key in section.model_fields_set}
        lines = [f"{key} = {toml(value)}" for key, value in values.items() if value is not None]
        if lines:
            sections.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(sections)


def _written_value(section: Any, key: str) -> Any:
    """The value of a setting as it is written in a file, or None if the setting must be left out."""
    value = getattr(section, key)
    return OFF if value is None and CAN_BE_OFF in type(section).model_fields[key].metadata else value


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 96, break_on_hyphens=False)]


def toml(value: Any) -> str:
    """Return a value in TOML syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        # Basic strings of TOML use the same escapes as JSON, and also escape DEL.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml(item) for item in value)}]"
    if isinstance(value, Section):
        value = {key: _written_value(value, key) for key in type(value).model_fields}
    if isinstance(value, dict):
        items = (f"{_key(key)} = {toml(item)}" for key, item in value.items() if item is not None)
        return f"{{{', '.join(items)}}}"
    return str(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key)
