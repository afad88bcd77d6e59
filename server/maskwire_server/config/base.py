"""The base class of the sections, and the types of values that several settings share."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Probability = Annotated[float, Field(ge=0, le=1)]

OFF = "off"
CAN_BE_OFF = BeforeValidator(lambda value: None if value == OFF else value)
"""Marks a limit or an interval that can be turned off. In a file, the environment and flags, the value is
then "off". In the code and in the records of a run, it is None. Ids, probabilities and counts cannot be
turned off."""
Steps = Annotated[Annotated[int, Field(ge=1)] | None, CAN_BE_OFF]
Positive = Annotated[Annotated[Finite, Field(gt=0)] | None, CAN_BE_OFF]


class Section(BaseModel):
    """A section of the configuration: immutable, and validated when it is created."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
