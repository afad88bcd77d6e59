"""The initial weights of a run without an intact checkpoint, generated from its seed or loaded again."""

from __future__ import annotations

import json

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.journal import Journal
from maskwire_server.recovery.trainer_interface import ReplayTrainer

STARTED_FROM = "began_from"
"""The kind of event that names the first checkpoint of a run whose initial weights were imported."""


def recorded(journal: Journal) -> str | None:
    """The recorded SHA-256 of initial weights that come from the model's source; None if there is none."""
    sha256 = json.loads(journal.fact("canonical"))["model"].get("weights_sha256")
    return sha256 or None


def come_from_seed(journal: Journal) -> bool:
    """Whether the run's initial weights can be generated again from its seed."""
    return recorded(journal) is None and journal.last_event(STARTED_FROM) is None


def require_source(journal: Journal) -> None:
    """Raise RunDirectoryError if the run began from imported weights, which only a checkpoint contains."""
    started = journal.last_event(STARTED_FROM)
    if started is not None:
        raise RunDirectoryError(
            f"the run began from imported weights in checkpoint {started[1]['checkpoint']!r}, and neither "
            "this nor a later checkpoint is intact: restore the run directory from a copy, or import the "
            "weights again into a new run"
        )


def restore(journal: Journal, trainer: ReplayTrainer) -> None:
    """Load the run's initial weights into a new trainer, which already has them if the seed makes them.

    Raises RunDirectoryError if the weights cannot be obtained again.
    """
    require_source(journal)
    sha256 = recorded(journal)
    if sha256 is None:
        return
    found = trainer.begin()
    if found != sha256:
        raise RunDirectoryError(
            "no checkpoint is intact, and the model's source no longer gives the weights that the run began "
            f"from: their SHA-256 is {found}, but {sha256} is recorded; restore the earlier files of the "
            "source, or restore the run directory from a copy"
        )
