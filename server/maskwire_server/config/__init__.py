"""The configuration: one module per section. Sections are immutable, and validated when they are created.

Flags win over the environment (`MASKWIRE_SECTION__KEY`), and the environment over the TOML file. Components
are given only the sections that they need.
"""

from maskwire_server.config.base import CAN_BE_OFF, OFF
from maskwire_server.config.checkpoints import CheckpointsConfig
from maskwire_server.config.config import Config
from maskwire_server.config.distributed import DistributedConfig
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.model_source import FactoryConfig, HuggingFaceConfig, LoraConfig
from maskwire_server.config.objective import PRESETS, ObjectiveConfig
from maskwire_server.config.optimizer import OptimizerConfig, ParameterGroup
from maskwire_server.config.record import NewerRunError, recorded_sections
from maskwire_server.config.run import RunConfig
from maskwire_server.config.sections import can_be_off
from maskwire_server.config.serve import ServeConfig
from maskwire_server.config.sources import load
from maskwire_server.config.storage import StorageConfig
from maskwire_server.config.telemetry import TelemetryConfig

__all__ = [
    "CAN_BE_OFF",
    "OFF",
    "PRESETS",
    "CheckpointsConfig",
    "Config",
    "DistributedConfig",
    "FactoryConfig",
    "HuggingFaceConfig",
    "LoraConfig",
    "ModelConfig",
    "NewerRunError",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParameterGroup",
    "RunConfig",
    "ServeConfig",
    "StorageConfig",
    "TelemetryConfig",
    "can_be_off",
    "load",
    "recorded_sections",
]
