"""The complete configuration of a server."""

from __future__ import annotations

import json
from typing import Any

from pydantic import PrivateAttr
from pydantic_settings import BaseSettings, SettingsConfigDict

from maskwire_server.config.base import Section
from maskwire_server.config.checkpoints import CheckpointsConfig
from maskwire_server.config.distributed import DistributedConfig
from maskwire_server.config.model import ModelConfig
from maskwire_server.config.objective import ObjectiveConfig
from maskwire_server.config.optimizer import OptimizerConfig
from maskwire_server.config.record import canonical, recorded, recorded_sections
from maskwire_server.config.run import RunConfig
from maskwire_server.config.serve import ServeConfig
from maskwire_server.config.storage import StorageConfig
from maskwire_server.config.telemetry import TelemetryConfig
from maskwire_server.errors import ConfigError


class Config(BaseSettings):
    """The complete configuration of a server: all sections."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="MASKWIRE_",
        env_nested_delimiter="__",
        validate_default=True,
    )

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    serve: ServeConfig = ServeConfig()
    distributed: DistributedConfig = DistributedConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    storage: StorageConfig = StorageConfig()

    _recorded: bytes | None = PrivateAttr(None)

    def canonical(self) -> bytes:
        """Return the canonical bytes of [model] and [objective], which the run's initial digest covers.

        For an existing run, these are the bytes that it recorded, because another version of maskwire may
        have other options.
        """
        if self._recorded is not None:
            return self._recorded
        return canonical(self.model, self.objective)

    def as_json(self) -> dict[str, Any]:
        """Return all settings as JSON values. [model] and [objective] have the form that runs record."""
        return self.model_dump(mode="json") | recorded(self.model, self.objective)

    @property
    def is_recorded(self) -> bool:
        """Whether [model], [objective] and the seed come from the record of an existing run."""
        return self._recorded is not None

    def with_weights(self, sha256: str) -> Config:
        """Return a copy of a new run's configuration with the SHA-256 of its initial weights."""
        return self.model_copy(update={"model": self.model.model_copy(update={"weights_sha256": sha256})})

    def of_run(self, seed: int, canonical: bytes) -> Config:
        """Return a copy with the fixed settings of an existing run: [model], [objective] and the seed.

        Raises a ConfigError that names each setting that was set here and differs from the run's record.
        """
        record = json.loads(canonical)
        model, objective = recorded_sections(record)
        differences = []
        if "seed" in self.run.model_fields_set and self.run.seed != seed:
            differences.append(f"run.seed is {seed} in the run, but {self.run.seed} in the configuration")
        for name, was in (("model", model), ("objective", objective)):
            section = getattr(self, name)
            recorded, configured = was.model_dump(mode="json"), section.model_dump(mode="json")
            differences += [
                f"{name}.{key} is {recorded[key]!r} in the run, but {configured[key]!r} in the configuration"
                for key in sorted(section.model_fields_set)
                if not _same(recorded[key], configured[key], getattr(section, key))
            ]
        if differences:
            raise ConfigError("; ".join(differences))
        run = self.run.model_copy(update={"seed": seed})
        whole = self.model_copy(update={"run": run, "model": model, "objective": objective})
        whole._recorded = canonical
        return whole


def _same(recorded: Any, configured: Any, setting: Any) -> bool:
    """Whether a setting has its recorded value. In a table, only the keys that were set are compared."""
    if isinstance(setting, Section) and isinstance(recorded, dict):
        return all(
            _same(recorded[key], configured[key], getattr(setting, key)) for key in setting.model_fields_set
        )
    return bool(recorded == configured)
