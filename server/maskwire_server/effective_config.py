"""The configuration that a run is served with: the operator's, completed from the run's record.

The server imports code only if the operator's own configuration names it. It is not enough that a run
directory names it, because the directory may come from somebody else.
"""

from __future__ import annotations

from collections.abc import Callable

from maskwire_server.config import Config
from maskwire_server.errors import ConfigError, RunDirectoryError
from maskwire_server.hugging_face_folder import filled_from_folder
from maskwire_server.recovery import recorded_config


def completed(config: Config) -> Config:
    """Complete the operator's configuration from the run in `run.dir` or from the folder of a new model.

    Raises ConfigError, and RunDirectoryError if the configuration does not fit the run.
    """
    whole = recorded_config.of_run(config, config.run.dir)
    return with_schedule(with_model(whole, config), config)


def with_model(config: Config, operators: Config) -> Config:
    """Complete the configuration from the model's folder if the run is new. Raises ConfigError.

    For an existing run, check that code which it names is also named in `operators`, the operator's
    configuration before it was completed from the run's record.
    """
    if not config.is_recorded:
        return config.model_copy(update={"model": filled_from_folder(config.model)})
    for table, key in (("python", "factory"), ("huggingface", "trust_remote_code")):
        value, own = (getattr(getattr(each.model, table), key, None) for each in (config, operators))
        if value and value != own:
            raise ConfigError(
                f"model.{table}.{key}: the run in {config.run.dir} has {value!r}, but the server runs code "
                "only if its own configuration names it: set model.source to "
                f"{config.model.source!r} and model.{table}.{key} to this value"
            )
    return config


def identity(config: Config) -> Callable[[str], bytes] | None:
    """Return a function that makes a new run's canonical configuration from its initial weights' SHA-256.

    Return None if the run exists, or if its initial weights are drawn from the seed.
    """
    if config.is_recorded or config.model.source == "encoder":
        return None
    return lambda sha256: config.with_weights(sha256).canonical()


def with_schedule(config: Config, operators: Config) -> Config:
    """Return a run's configuration with the fingerprint of its schedule, if this is a user's function.

    Imports and checks the function. `operators` is the operator's configuration, before it was completed from
    the run's record: the server imports no code that only a run directory names. Raises ConfigError, and
    RunDirectoryError if the function is not the one that the run was created with.
    """
    objective = config.objective
    if not objective.has_schedule_function:
        return config
    if "schedule" not in operators.objective.model_fields_set:
        raise ConfigError(
            f"objective.schedule: the run in {config.run.dir} uses the function {objective.schedule!r}, but "
            "the server imports code only if its own configuration names it: set objective.schedule to it"
        )
    from maskwire_server.training import masking_schedule  # imports torch

    found = masking_schedule.fingerprint(objective, config.model.max_seq_len)
    if objective.schedule_sha256 not in (None, found):
        raise RunDirectoryError(
            f"objective.schedule: the function {objective.schedule!r} is not the one that the run in "
            f"{config.run.dir} was created with: the SHA-256 of its values is {found}, but the run recorded "
            f"{objective.schedule_sha256}; restore the function, or start a new run in an empty directory"
        )
    return config.model_copy(update={"objective": objective.model_copy(update={"schedule_sha256": found})})
