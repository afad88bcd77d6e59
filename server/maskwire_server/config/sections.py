"""All sections of the configuration by name, and the settings that can be off."""

from __future__ import annotations

from maskwire_server.config.base import CAN_BE_OFF, Section
from maskwire_server.config.checkpoints import CheckpointsConfig
from maskwire_server.config.distributed import DistributedConfig
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.objective import ObjectiveConfig
from maskwire_server.config.optimizer import OptimizerConfig
from maskwire_server.config.run import RunConfig
from maskwire_server.config.serve import ServeConfig
from maskwire_server.config.storage import StorageConfig
from maskwire_server.config.telemetry import TelemetryConfig

SECTIONS: dict[str, type[Section]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
    "checkpoints": CheckpointsConfig,
    "serve": ServeConfig,
    "distributed": DistributedConfig,
    "telemetry": TelemetryConfig,
    "storage": StorageConfig,
}
"""The sections, in their order in the generated file and pages."""


def can_be_off() -> list[str]:
    """The names of the settings that accept "off", as SECTION.KEY."""
    return [
        f"{name}.{key}"
        for name, section in SECTIONS.items()
        for key, setting in section.model_fields.items()
        if CAN_BE_OFF in setting.metadata
    ]
