"""The sections that belong to a run, as the run recorded them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from maskwire_server.config.messages import message
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.objective import ObjectiveConfig
from maskwire_server.errors import ConfigError


class NewerRunError(ConfigError):
    """A run records options that only a newer version has."""


def recorded_sections(record: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """[model] and [objective] as a run recorded them, by this version or another.

    An option that the record lacks is newer than the run and has its default, whatever a preset says now:
    a new option's default must be what was done before there was the option. Raises ConfigError for options
    that this version does not have.
    """
    fields = {"model": ModelConfig.model_fields, "objective": ObjectiveConfig.model_fields}
    unknown = [f"{name}.{key}" for name in fields for key in record[name] if key not in fields[name]]
    if unknown:
        raise NewerRunError(
            f"{', '.join(unknown)} is recorded, and this version does not know it: a newer version wrote the "
            "run, use that one"
        )
    whole = {
        name: {**{key: field.default for key, field in fields[name].items()}, **record[name]}
        for name in fields
    }
    try:
        return ModelConfig(**whole["model"]), ObjectiveConfig(**whole["objective"])
    except ValidationError as error:
        raise ConfigError("; ".join(message(problem) for problem in error.errors())) from None
