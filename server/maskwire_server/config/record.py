"""The sections [model] and [objective] in the form in which a run records them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from maskwire_server.config.base import Section
from maskwire_server.config.messages import message
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.objective import ObjectiveConfig
from maskwire_server.errors import ConfigError

ALWAYS_RECORDED = {
    "model": {
        "num_tokens", "mask_id", "pad_id", "max_seq_len", "dim", "depth", "heads", "dim_head", "ff_mult",
        "emb_dim", "dropout", "positions", "norm", "feed_forward", "qk_norm", "tied_embeddings",
    },
    "objective": {
        "preset", "schedule", "masking", "weighting", "no_replace_prob", "random_token_prob", "augment_prob",
        "self_cond", "self_cond_prob", "self_cond_start", "critic", "critic_loss_weight", "critic_labels",
    },
}  # fmt: skip
"""The options of the first format. Every run records them. A later option is recorded if it is not default.

A new option therefore changes neither the first digest nor the recorded configuration of runs that do not use
it. Do not add options here."""


def recorded(model: ModelConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """Return [model] and [objective] in the form in which runs and checkpoints record them."""
    return {"model": _recorded("model", model), "objective": _recorded("objective", objective)}


def canonical(model: ModelConfig, objective: ObjectiveConfig) -> bytes:
    """Return the recorded form of [model] and [objective] as JSON bytes, which the initial digest covers."""
    return json.dumps(recorded(model, objective), sort_keys=True, separators=(",", ":")).encode()


def _recorded(name: str, section: Section) -> dict[str, Any]:
    fields = type(section).model_fields
    return {
        key: value
        for key, value in section.model_dump(mode="json").items()
        if key in ALWAYS_RECORDED[name]
        or getattr(section, key) != fields[key].get_default(call_default_factory=True)
    }


class NewerRunError(ConfigError):
    """Raised if a run has recorded options that only a newer version of maskwire has."""


def recorded_sections(record: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """Decode [model] and [objective] from the record of a run that this or another version created.

    An option that the record lacks had its default value, or did not exist yet. It gets its own default, not
    that of a preset, because the default of a new option must be the behaviour before the option existed.
    Raises NewerRunError for options that this version does not have, and ConfigError for invalid values.
    """
    fields = {"model": ModelConfig.model_fields, "objective": ObjectiveConfig.model_fields}
    unknown = [f"{name}.{key}" for name in fields for key in record[name] if key not in fields[name]]
    if unknown:
        raise NewerRunError(
            f"the run has recorded {', '.join(unknown)}, which this version of maskwire does not know: a "
            "newer version created the run; use that version"
        )
    whole = {
        name: {
            **{key: field.get_default(call_default_factory=True) for key, field in fields[name].items()},
            **record[name],
        }
        for name in fields
    }
    try:
        return ModelConfig(**whole["model"]), ObjectiveConfig(**whole["objective"])
    except ValidationError as error:
        raise ConfigError("; ".join(message(problem) for problem in error.errors())) from None
