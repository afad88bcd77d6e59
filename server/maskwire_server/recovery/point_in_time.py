"""Computing a run again up to an earlier step, beside the run and without changing it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskwire_server.checkpoints.saver import KEPT_SECTIONS
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine.device import Trainer, build
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.ancestry import Segment, ancestry
from maskwire_server.manifest import Manifest
from maskwire_server.recovery import boot, fingerprint, inexact, replay
from maskwire_server.recovery.verify import open_run
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)


def rewind(
    run_dir: Path,
    factory: Callable[[], Trainer],
    configuration: dict[str, Any],
    *,
    seed: int,
    canonical: bytes,
    to_step: int,
    out: Path | None,
    accept_inexact: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[CheckpointInfo, int]:
    """Compute the current history up to a step, and write the state there as a checkpoint's folder `out`.

    Begins at the newest whole checkpoint at or before the step, or at the run's beginning; the losses must be
    the recorded ones. Returns the state's checkpoint, and how many steps were not exact. Raises
    RunDirectoryError.
    """
    journal = open_run(run_dir)
    try:
        boot.check_same_run(journal, run_dir, seed, canonical)
        lineages = journal.lineages()
        segments = ancestry(lineages, max(lineages))
        last = next((s for s in segments if s.through is None or to_step <= s.through), segments[-1])
        segments = [*segments[: segments.index(last)], Segment(last.lineage, to_step)]
        digest = replay.digest_at(journal, last.lineage, to_step)
        if digest is None:
            raise RunDirectoryError(f"{run_dir}: there is no step {to_step} in the run's history")
        if out is not None and out.exists():
            raise RunDirectoryError(f"{out} exists; name another folder")
        checkpoints = Checkpoints(run_dir)
        manifest, wrong = boot.newest_verified(checkpoints, journal, segments)
        for name, problem in wrong.items():
            tell(f"checkpoint {name} passed over: {problem}")
        device = build(factory, fingerprint.pinned_threads(journal))
        versions = device.versions
        start = (segments[0].lineage, 0)
        if manifest is None:
            boot.require_seed(journal)
        else:
            start = (manifest.info.lineage, manifest.info.step)
            device.load(checkpoints.path(manifest.info.name))
            tell(f"loaded checkpoint {manifest.info.name} (step {start[1]})")
        settings = fingerprint.numerics(configuration, versions)
        follow = fingerprint.Following(
            journal, settings, device.configure,
            strict=not accept_inexact, inexact=inexact.ahead(inexact.recorded(journal), segments, start),
        )  # fmt: skip
        records = replay.steps_to_replay(journal, segments, start)
        done = replay.replay(
            replay.told(follow.follow(records), to_step - start[1], tell),
            device.train_step,
            version=replay.recorded_version(journal),
            tolerance=follow.tolerance,
            accept_inexact=accept_inexact,
        )
        tell(f"computed {done.count} steps again, {done.differing} of them not exactly")
        name = out.name if out is not None else f"step-{to_step:09d}"
        info = CheckpointInfo(name, last.lineage, to_step, digest, (), time.time())
        if out is None:
            return info, done.differing
        kept = {section: configuration[section] for section in KEPT_SECTIONS if section in configuration}
        history = inexact.within(inexact.recorded(journal), segments)
        state = Manifest(
            info, journal.fact("run_id"), False, None, kept, versions,
            (*history, *done.inexact(accepted=follow.accepted)),
        )  # fmt: skip
        beside = Checkpoints(run_dir)
        beside.folder = out.absolute().parent
        beside.folder.mkdir(parents=True, exist_ok=True)
        return beside.write(device.snapshot(), state).info, done.differing
    finally:
        journal.close()
