"""Completes a configuration with the settings that an existing run recorded."""

from __future__ import annotations

from pathlib import Path

from maskwire_server.config import Config, NewerRunError
from maskwire_server.errors import ConfigError, RunDirectoryError
from maskwire_server.journal.database import explained
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.run_directory import JOURNAL_FILE


def of_run(config: Config, run_dir: Path) -> Config:
    """Complete a configuration with the settings of the run in `run_dir`. Without a run, return it unchanged.

    The seed and the options of [model] and [objective] that are not set come from the run's record, so that
    a newer version with new options, defaults and presets can open an older run. Raises RunDirectoryError,
    which names each option whose value differs from the record.
    """
    if not (run_dir / JOURNAL_FILE).is_file():
        return config
    journal = Journal(run_dir)
    try:
        if journal.is_new:
            return config
        with explained(run_dir):
            seed, canonical = journal.fact("seed"), journal.fact("canonical")
        return completed(config, str(run_dir), seed, canonical)
    finally:
        journal.close()


def completed(config: Config, where: str, seed: int, canonical: bytes) -> Config:
    """Complete a configuration with a run's seed and options. `where` names the run if an error is raised."""
    try:
        return config.of_run(seed, canonical)
    except NewerRunError as error:
        raise RunDirectoryError(f"{where}: {error}") from error
    except ConfigError as error:
        raise RunDirectoryError(
            f"{where}: {error}; the model, objective and seed of a run cannot change: "
            "remove these settings, restore the recorded values, or start a new run in an empty directory"
        ) from error
