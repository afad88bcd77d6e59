"""The state of a run at an earlier step, recomputed without changing the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskwire_server.checkpoints.saver import kept_sections
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import Segment, ancestry
from maskwire_server.manifest import Manifest
from maskwire_server.recovery import boot, fingerprint
from maskwire_server.recovery.rebuild import rebuild
from maskwire_server.recovery.trainer_interface import ReplayTrainer
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)


def rewind(
    run_dir: Path,
    factory: Callable[[], ReplayTrainer],
    configuration: dict[str, Any],
    *,
    seed: int,
    canonical: bytes,
    to_step: int,
    out: Path | None,
    accept_inexact: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[CheckpointInfo, int]:
    """Compute the current history up to `to_step`, and write the state to the folder `out` as a checkpoint.

    Without `out`, nothing is written. Starts from the newest intact checkpoint at or before the step, or from
    the initial weights. The losses must equal the recorded losses, or lie within the tolerance if results are
    not reproducible. Returns the description of the checkpoint and the number of recomputed steps that
    differed. Raises RunDirectoryError.
    """
    journal = boot.open_recorded(run_dir)
    try:
        boot.check_same_run(journal, run_dir, seed, canonical)
        lineages = journal.lineages()
        segments = ancestry(lineages, max(lineages))
        last = next((s for s in segments if s.through is None or to_step <= s.through), segments[-1])
        segments = [*segments[: segments.index(last)], Segment(last.lineage, to_step)]
        digest = journal.digest_at(last.lineage, to_step)
        if digest is None:
            raise RunDirectoryError(
                f"{run_dir}: the run's history has no step {to_step}; choose an earlier step"
            )
        if out is not None and out.exists():
            raise RunDirectoryError(f"{out} exists already; choose a new folder with --out")
        checkpoints = Checkpoints(run_dir)
        trainer = factory()
        threads = fingerprint.pinned_threads(journal)
        if threads is not None:
            trainer.use_threads(threads)
        rebuilt = rebuild(
            journal,
            checkpoints,
            trainer,
            fingerprint.numerics(configuration, trainer.versions),
            segments,
            to_step,
            accept_inexact=accept_inexact,
            on_unusable_checkpoint=lambda name, problem: tell(f"checkpoint {name} cannot be used: {problem}"),
            tell=tell,
        )
        tell(
            f"recomputed {rebuilt.count} step{'s' * (rebuilt.count != 1)}; "
            f"{rebuilt.differing} differed from the record"
        )
        name = out.name if out is not None else f"step-{to_step:09d}"
        info = CheckpointInfo(name, last.lineage, to_step, digest, (), time.time())
        if out is None:
            return info, rebuilt.differing
        history = inexact_replays.within(inexact_replays.recorded(journal), segments)
        state = Manifest(
            info, journal.fact("run_id"), False, None, kept_sections(configuration), trainer.versions,
            (*history, *rebuilt.inexact),
        )  # fmt: skip
        beside = Checkpoints(run_dir)
        beside.folder = out.absolute().parent
        beside.folder.mkdir(parents=True, exist_ok=True)
        return beside.write(trainer.snapshot(), state).info, rebuilt.differing
    finally:
        journal.close()
