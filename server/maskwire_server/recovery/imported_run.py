"""A run that starts from imported weights.

The run directory is written under a temporary name and then renamed, so that a server never starts from an
interrupted import, whose run would begin with other weights.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from maskwire_server.checkpoints import provenance
from maskwire_server.checkpoints.saver import kept_sections
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.journal.fsync import flush_folder, make_folder
from maskwire_server.journal.journal import Journal
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.recovery import boot
from maskwire_server.recovery.initial_weights import STARTED_FROM
from maskwire_server.recovery.trainer_interface import ReplayTrainer
from maskwire_server.results import CheckpointInfo

NAME = "imported"


def begin(
    run_dir: Path,
    factory: Callable[[], ReplayTrainer],
    configuration: dict[str, Any],
    *,
    seed: int,
    canonical: bytes,
    versions: dict[str, str],
    labels: dict[str, str],
    texts: dict[str, str],
) -> CheckpointInfo:
    """Create a run at step 0. Its first checkpoint, `imported`, is the state of the trainer from `factory`.

    `texts` are the contents of further files in the run directory, by file name. Retention never deletes this
    checkpoint, because its weights cannot be generated from the seed. Raises RunDirectoryError if the
    directory is not empty, is the root of a volume, or cannot be written.
    """
    try:
        if run_dir.is_mount():  # a folder cannot be renamed to a mount point
            raise RunDirectoryError(
                f"cannot import a run into {run_dir}: it is the root of a volume; choose a folder in it, "
                f"for example --run-dir {run_dir / 'run'}"
            )
        if run_dir.exists() and any(run_dir.iterdir()):
            raise RunDirectoryError(f"{run_dir} is not empty; choose an empty or new folder with --run-dir")
        place = run_dir.absolute()
        draft = place.with_name(f"{place.name}.importing")
        if draft.exists():
            shutil.rmtree(draft)
        make_folder(draft)
        try:
            info = _write(draft, factory, configuration, seed, canonical, versions, labels)
            for name, text in texts.items():
                with (draft / name).open("w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            flush_folder(draft)
            draft.rename(place)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        flush_folder(place.parent)
    except Refused as error:
        raise RunDirectoryError(f"{run_dir}: {error.message}") from error
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir} cannot be written ({error.strerror}); check its permissions and the free disk space"
        ) from error
    return info


def _write(
    folder: Path,
    factory: Callable[[], ReplayTrainer],
    configuration: dict[str, Any],
    seed: int,
    canonical: bytes,
    versions: dict[str, str],
    labels: dict[str, str],
) -> CheckpointInfo:
    journal = boot.open_journal(folder, seed=seed, canonical=canonical)
    try:
        trainer = factory()
        lineage = journal.lineages()[1]
        manifest = Manifest(
            CheckpointInfo(NAME, lineage.lineage, 0, lineage.digest, (), time.time(), labels),
            journal.fact("run_id"),
            False,
            None,
            kept_sections(configuration),
            versions | trainer.versions,
            save_id=provenance.new_save_id(),
        )
        info = Checkpoints(folder).write(trainer.snapshot(), manifest).info
        # The seed cannot generate these weights: the run must not start without this checkpoint.
        journal.transaction(partial(_record, journal, manifest))
        return info
    finally:
        journal.close()


def _record(journal: Journal, manifest: Manifest) -> None:
    info = manifest.info
    place = HistoryPosition(manifest.run_id, info.lineage, info.step, info.digest)
    provenance.record_save(journal, place, manifest.save_id or "")
    journal.add_event(STARTED_FROM, {"checkpoint": NAME})
