"""The sections that are fixed once a run exists, as the run recorded them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from maskwire_server.config.messages import message
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.objective import ObjectiveConfig
from maskwire_server.errors import ConfigError


class NewerRunError(ConfigError):
    """A run has recorded options that only a newer version has."""


def recorded_sections(record: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """[model] and [objective] as this or another version recorded them in a run.

    An option that is missing in the record is newer than the run. It gets its own default, not that of a
    preset: the default of a new option must be the behaviour before the option existed. Raises ConfigError
    for options that this version does not have.
    """
    fields = {"model": ModelConfig.model_fields, "objective": ObjectiveConfig.model_fields}
    unknown = [f"{name}.{key}" for name in fields for key in record[name] if key not in fields[name]]
    if unknown:
        raise NewerRunError(
            f"{', '.join(unknown)} is recorded, and this version does not know it: a newer version "
            "created the run; use that version"
        )
    whole = {
        name: {**{key: field.default for key, field in fields[name].items()}, **record[name]}
        for name in fields
    }
    try:
        return ModelConfig(**whole["model"]), ObjectiveConfig(**whole["objective"])
    except ValidationError as error:
        raise ConfigError("; ".join(message(problem) for problem in error.errors())) from None
