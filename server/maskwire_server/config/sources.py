"""Load the configuration. Flags win over the environment, and the environment over the TOML file."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    TomlConfigSettingsSource,
)

from maskwire_server.config.config import Config
from maskwire_server.config.messages import message
from maskwire_server.errors import ConfigError

FREE_TABLES = (("model", "x_transformers"), ("model", "python", "options"))
"""Tables whose values may have any type: text from flags and the environment is parsed as TOML or JSON."""


class _Environment(EnvSettingsSource):
    """Reads settings from environment variables. Tables and lists are in TOML or JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002
        return decoded(value)

    def explode_env_vars(
        self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]
    ) -> dict[str, Any]:
        found = super().explode_env_vars(field_name, field, env_vars)
        for section, *tables in FREE_TABLES:
            table: Any = found if section == field_name else {}
            for name in tables:
                table = table.get(name, {})
            for key, value in table.items():
                table[key] = decoded(value) if isinstance(value, str) else value
        return found


def decoded(text: str) -> Any:
    """Parse a value in TOML or JSON. Return other text unchanged, so that validation reports its key."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            return json.loads(text)
        except ValueError:
            return text


def load(file: Path | None = None, **flags: dict[str, Any]) -> Config:
    """Load the configuration from `file`, the environment and `flags` (settings by section).

    Raises ConfigError with one line per problem: the key, what is allowed, and the value that was given.
    """

    class _Sourced(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            toml = TomlConfigSettingsSource(settings_cls, toml_file=file)
            return init_settings, _Environment(settings_cls), toml

    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: no such file; `maskwire-server init` writes one")
    try:
        return _Sourced(**flags)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("\n".join(message(problem) for problem in error.errors())) from None
    except ValueError as error:  # the file is not valid TOML
        bare = file is not None and re.search(r"(?m)^\s*\w+\s*=\s*off\b", file.read_text(errors="replace"))
        hint = f'; write {bare[0].split("=")[0].strip()} = "off", with quotes' if bare else ""
        raise ConfigError(f"{file}: not valid TOML: {error}{hint}") from None
