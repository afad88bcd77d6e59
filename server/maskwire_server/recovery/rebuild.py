"""Rebuilds the state of a run: loads its newest intact checkpoint and computes the later steps again.

`serve` and `replay` both use this. The recomputed losses must equal the recorded losses byte for byte, or lie
within the tolerance if results are not reproducible.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from maskwire_server import failpoints
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import Segment
from maskwire_server.journal.journal import Journal
from maskwire_server.recovery import initial_weights
from maskwire_server.recovery.base_checkpoint import newest_verified
from maskwire_server.recovery.replay import Replayed, recorded_version, replay, steps_to_replay, with_progress
from maskwire_server.recovery.replay_settings import ReplaySettings
from maskwire_server.recovery.trainer_interface import ReplayTrainer

log = logging.getLogger(__name__)


def rebuild(
    journal: Journal,
    checkpoints: Checkpoints,
    trainer: ReplayTrainer,
    settings: dict[str, Any],
    segments: list[Segment],
    last_step: int,
    *,
    accept_inexact: bool,
    accept_lost: bool = False,
    on_unusable_checkpoint: Callable[[str, str], None],
    tell: Callable[[str], None],
) -> Replayed:
    """Bring the trainer to the state after `last_step`, which is the last step of the ancestry `segments`.

    `on_unusable_checkpoint` is called with the name of each unusable checkpoint and its problem. `tell` is
    called with progress messages. Returns the outcome of the replay. Raises RunDirectoryError.
    """
    manifest, wrong = newest_verified(checkpoints, journal, segments, accept_lost=accept_lost)
    failpoints.passing("recovery.chosen")
    for name, problem in wrong.items():
        on_unusable_checkpoint(name, problem)
    start = (segments[0].lineage, 0)
    loading = time.monotonic()
    if manifest is None:
        initial_weights.restore(journal, trainer)
    else:
        info = manifest.info
        start = (info.lineage, info.step)
        tell(f"checkpoint {info.name}")
        try:
            trainer.load(checkpoints.path(info.name))
        except ValueError as error:
            raise RunDirectoryError(
                f"checkpoint {info.name!r} does not fit the configuration: {error}; start with the "
                "configuration that it was saved with"
            ) from error
        failpoints.passing("recovery.loaded")
        log.info("loaded checkpoint %s (step %d) in %.1f s", info.name, info.step, time.monotonic() - loading)
    recorded = ReplaySettings(
        journal,
        settings,
        trainer.configure,
        strict=not accept_inexact,
        inexact=inexact_replays.ahead(inexact_replays.recorded(journal), segments, start),
    )
    records = recorded.apply(steps_to_replay(journal, segments, start))
    began = time.monotonic()
    replayed = replay(
        with_progress(records, last_step - start[1], tell),
        trainer.train_step,
        version=recorded_version(journal),
        tolerance=recorded.tolerance,
        accept_inexact=accept_inexact,
    )
    replayed.load_seconds, replayed.seconds = began - loading, time.monotonic() - began
    if replayed.count:
        word = "step" if replayed.count == 1 else "steps"
        log.info("replayed %d %s in %.1f s", replayed.count, word, replayed.seconds)
    recorded.restore()
    failpoints.passing("recovery.replayed")
    replayed.accepted = recorded.accepted or bool(replayed.beyond)
    return replayed
