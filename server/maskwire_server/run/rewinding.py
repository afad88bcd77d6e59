"""Computing a run again up to an earlier step, beside the run and without changing it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from maskwire_server.errors import RunDirectoryError
from maskwire_server.manifest import Manifest
from maskwire_server.results import CheckpointInfo
from maskwire_server.run import recovery
from maskwire_server.run.ancestry import Segment, ancestry
from maskwire_server.run.audit import open_run
from maskwire_server.run.checkpoint import Checkpoints
from maskwire_server.run.device import Device, Trainer
from maskwire_server.run.saving import KEPT_SECTIONS

log = logging.getLogger(__name__)


def rewind(
    run_dir: Path,
    factory: Callable[[], Trainer],
    configuration: dict[str, Any],
    *,
    to_step: int,
    out: Path | None,
    accept_inexact: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> CheckpointInfo:
    """Compute the current history up to a step, and write the state there as a checkpoint's folder `out`.

    Begins at the newest whole checkpoint at or before the step; the losses must be the recorded ones.
    Raises RunDirectoryError.
    """
    journal = open_run(run_dir)
    device = Device(lambda act: act())
    try:
        lineages = journal.lineages()
        segments = ancestry(lineages, max(lineages))
        last = next((s for s in segments if s.through is None or to_step <= s.through), segments[-1])
        segments = [*segments[: segments.index(last)], Segment(last.lineage, to_step)]
        digest = recovery.digest_at(journal, last.lineage, to_step)
        if digest is None:
            raise RunDirectoryError(f"{run_dir}: there is no step {to_step} in the run's history")
        if out is not None and out.exists():
            raise RunDirectoryError(f"{out} exists; name another folder")
        checkpoints = Checkpoints(run_dir)
        manifest, damaged = recovery.newest_verified(checkpoints, journal, segments)
        for problem in damaged:
            tell(f"checkpoint passed over, its files are damaged: {problem}")
        if manifest is None:
            raise RunDirectoryError(f"{run_dir}: no whole checkpoint lies at or before step {to_step}")
        _, versions = device.call(partial(device.build, factory))
        device.call(partial(device.load, checkpoints.path(manifest.info.name), manifest.info.step))
        tell(f"loaded checkpoint {manifest.info.name} (step {manifest.info.step})")
        settings = recovery.numerics(configuration) | recovery.fingerprint(versions)
        following = recovery.Following(
            journal, settings, lambda section: device.call(partial(device.configure, section)),
            strict=not accept_inexact,
        )  # fmt: skip
        start = (manifest.info.lineage, manifest.info.step)
        records = recovery.steps_to_replay(journal, segments, start)
        count, inexact = recovery.replay(
            recovery.told(following.follow(records), to_step - start[1], tell),
            lambda *step: device.call(partial(device.replay, *step)),
            accept_inexact=accept_inexact,
        )
        tell(f"computed {count} steps again, {len(inexact)} of them not exactly")
        name = out.name if out is not None else f"step-{to_step:09d}"
        info = CheckpointInfo(name, last.lineage, to_step, digest, (), time.time())
        if out is None:
            return info
        kept = {section: configuration[section] for section in KEPT_SECTIONS if section in configuration}
        state = Manifest(info, journal.fact("run_id"), False, None, kept, versions)
        beside = Checkpoints(run_dir)
        beside.folder = out.absolute().parent
        beside.folder.mkdir(parents=True, exist_ok=True)
        return beside.write(device.call(device.snapshot), state).info
    finally:
        device.close()
        journal.close()
