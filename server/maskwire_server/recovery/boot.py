"""From the files of a run directory to a running state.

Recovery = the newest verified checkpoint on the current lineage's ancestry, and the journal's later
steps computed again. The recomputed losses must equal the recorded bytes.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maskwire.v1.digest import initial_digest, lineage_digest
from maskwire_server import failpoints
from maskwire_server.checkpoints.membership import foreign_save, recorded_saves
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine.device import Device
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.ancestry import Segment, ancestry, on_path
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, SessionRecord
from maskwire_server.manifest import Manifest
from maskwire_server.recovery import inexact
from maskwire_server.recovery.fingerprint import Following
from maskwire_server.recovery.replay import digest_at, recorded_version, replay, steps_to_replay, told
from maskwire_server.results import Outcome

log = logging.getLogger(__name__)


BEGAN_FROM = "began_from"  # an event of runs whose first weights no seed makes


def open_journal(run_dir: Path, *, seed: int, canonical: bytes, durable: bool = True) -> Journal:
    """Open the run of a directory, or begin one in an empty directory.

    Raises RunDirectoryError when the directory holds another run, or something else.
    """
    journal = Journal(run_dir, durable=durable)
    try:
        if journal.is_new:
            facts = {"run_id": uuid.uuid4().hex, "seed": seed, "canonical": canonical}
            journal.create(facts, initial_digest(canonical, seed))
        else:
            check_same_run(journal, run_dir, seed, canonical)
    except sqlite3.Error as error:
        journal.close()
        raise RunDirectoryError(
            f"{run_dir}: the journal cannot be written ({error}); make room on its disk, and start again"
        ) from error
    except BaseException:
        journal.close()
        raise
    return journal


def check_same_run(journal: Journal, run_dir: Path, seed: int, canonical: bytes) -> None:
    """Raise RunDirectoryError, naming each difference, unless seed, model and objective are the run's."""
    differences = []
    if journal.fact("seed") != seed:
        differences.append(f"run.seed is {journal.fact('seed')} in the run, {seed} in the configuration")
    recorded, configured = json.loads(journal.fact("canonical")), json.loads(canonical)
    for section in recorded.keys() | configured.keys():
        was, now = recorded.get(section, {}), configured.get(section, {})
        differences += [
            f"{section}.{key} is {was.get(key)!r} in the run, {now.get(key)!r} in the configuration"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
    if differences:
        raise RunDirectoryError(
            f"{run_dir}: {'; '.join(differences)}: model, objective and seed belong to the run; put them "
            "back, or start a new run in an empty directory"
        )


def newest_verified(
    checkpoints: Checkpoints, journal: Journal, segments: list[Segment], *, accept_lost: bool = False
) -> tuple[Manifest | None, dict[str, str]]:
    """The newest whole checkpoint of the ancestry with its files intact; what is wrong with others, by name.

    Raises RunDirectoryError when a checkpoint holds a step that the journal lost, unless `accept_lost`.
    """
    run_id = journal.fact("run_id")
    lineages, saves = journal.lineages(), recorded_saves(journal)
    wrong = checkpoints.unreadable()
    found = checkpoints.all()
    for manifest in found:
        info = manifest.info
        if manifest.run_id != run_id:
            wrong[info.name] = f"it belongs to run {manifest.run_id}"
            continue
        recorded = digest_at(journal, info.lineage, info.step) if info.lineage in lineages else None
        if recorded == info.digest:
            foreign = foreign_save(manifest, saves)
            if foreign is not None:
                wrong[info.name] = foreign
            continue
        if recorded is not None:  # the journal lost nothing: it holds this step with another history
            wrong[info.name] = (
                f"it comes from another copy of the run: its history up to step {info.step} (lineage "
                f"{info.lineage}) is not this one"
            )
            continue
        lost = f"it holds step {info.step} (lineage {info.lineage}), which the journal does not have"
        if not accept_lost:
            raise RunDirectoryError(
                f"checkpoint {info.name!r}: {lost}. If it was copied here from another copy of the run, move "
                "it out of checkpoints/. Otherwise the journal lost acknowledged steps: restore the run "
                "directory from a copy, or continue without them, for good, with --accept-lost-history"
            )
        wrong[info.name] = lost
    for manifest in on_path(found, segments):
        if manifest.info.name in wrong:
            continue
        problem = checkpoints.damage(manifest)
        if problem is None:
            return manifest, wrong
        wrong[manifest.info.name] = problem
    return None, wrong


def require_seed(journal: Journal) -> None:
    """Raise RunDirectoryError when a run cannot begin from its seed, for want of any checkpoint."""
    began = journal.last_event(BEGAN_FROM)
    if began is not None:
        raise RunDirectoryError(
            f"the run began from checkpoint {began[1]['checkpoint']!r}, weights from elsewhere, and neither "
            "it nor a later one is whole: restore the run directory from a copy, or import again"
        )


@dataclass(frozen=True)
class Recovered:
    """Where the run is after recovery."""

    lineage: int
    step: int
    digest: bytes
    non_finite: int
    """Steps in a row, up to the last and since the last takeover, that were not finite."""
    replayed_inexactly: bool
    """The state is one that an inexact replay led to: it must be saved before anything follows from it."""
    accepted: bool
    """Something that no tolerance covers was accepted on the way."""


def recover(
    journal: Journal,
    checkpoints: Checkpoints,
    device: Device,
    settings: dict[str, Any],
    *,
    accept_inexact: bool = False,
    accept_lost: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    with_room: Callable[[Callable[[], None]], None] = lambda write: write(),
) -> Recovered:
    """Bring the device's trainer to the journal's last step; `tell` hears what takes its time.

    `with_room` does what is written to the journal, and may wait until its disk has room for it.
    Checkpoints that are damaged are set aside. Raises RunDirectoryError when it cannot be done exactly.
    """
    lineages = journal.lineages()
    lineage = max(lineages)
    segments = ancestry(lineages, lineage)
    journal.check_requests(lineage)
    for name in checkpoints.sweep():
        log.info("removed the unfinished checkpoint %s", name)
    manifest, wrong = newest_verified(checkpoints, journal, segments, accept_lost=accept_lost)
    failpoints.passing("recovery.chosen")
    for name, problem in wrong.items():
        try:
            aside = f"moved to {checkpoints.set_aside(name)}"
        except OSError as error:
            aside = f"left where it is ({error.strerror})"
        log.warning("checkpoint %s passed over, and %s: %s", name, aside, problem)
    start = (segments[0].lineage, 0)
    if manifest is None:
        require_seed(journal)
    else:
        info = manifest.info
        start = (info.lineage, info.step)
        tell(f"checkpoint {info.name}")
        loading = time.monotonic()
        try:
            device.load(checkpoints.path(info.name))
        except ValueError as error:
            raise RunDirectoryError(
                f"checkpoint {info.name!r} does not fit the configuration: {error}; start with it as it was"
            ) from error
        failpoints.passing("recovery.loaded")
        took = time.monotonic() - loading
        log.info("loaded checkpoint %s (step %d) in %.1f s", info.name, info.step, took)
    last = journal.last_step(lineage)
    step, digest = (last.step, last.digest) if last else (lineages[lineage].step, lineages[lineage].digest)
    records = steps_to_replay(journal, segments, start)
    following = Following(
        journal,
        settings,
        device.configure,
        strict=not accept_inexact,
        inexact=inexact.ahead(inexact.recorded(journal), segments, start),
    )
    began = time.monotonic()
    done = replay(
        told(following.follow(records), step - start[1], tell),
        device.train_step,
        version=recorded_version(journal),
        tolerance=following.tolerance,
        accept_inexact=accept_inexact,
    )
    if done.count:
        log.info("replayed %d steps in %.1f s", done.count, time.monotonic() - began)
    following.end()
    failpoints.passing("recovery.replayed")
    found = done.inexact(accepted=following.accepted)
    if found:
        with_room(partial(inexact.record, journal, found, done.beyond))
    accepted = following.accepted or bool(done.beyond)
    return Recovered(lineage, step, digest, _non_finite(journal, lineage, step), bool(found), accepted)


def accept_lost_history(
    journal: Journal,
    recovered: Recovered,
    step: int,
    *,
    with_room: Callable[[Callable[[], None]], None] = lambda write: write(),
) -> Recovered:
    """Go on from the last step that is left, on a new lineage, so that no client mistakes it for the old.

    Raises RunDirectoryError unless that is `step`. Done once for a step, however often it is asked for.
    """
    current = journal.lineages()[recovered.lineage]
    if recovered.step != step:
        raise RunDirectoryError(
            f"--accept-lost-history {step}: the run is at step {recovered.step}; name that one to go on from "
            "it, or leave the option out"
        )
    if current.parent is not None and current.checkpoint is None and current.step == step:
        return recovered
    number = recovered.lineage + 1
    digest = lineage_digest(recovered.digest, number)
    last = journal.last_session()

    def write() -> None:
        journal.add_lineage(Lineage(number, recovered.lineage, step, digest, None, None))
        journal.add_event("accepted_lost_history", {"lineage": number, "step": step})
        epoch = (last.epoch if last else 0) + 1  # used up, so that no writer goes on unaware
        journal.add_session(SessionRecord(epoch, "lost history", None, False, number, step, True))

    with_room(partial(journal.transaction, write))
    log.warning("lost history accepted: lineage %d goes on from step %d", number, step)
    return Recovered(number, step, digest, 0, recovered.replayed_inexactly, recovered.accepted)


def _non_finite(journal: Journal, lineage: int, step: int) -> int:
    session = journal.last_takeover()
    since = session.step if session is not None and session.lineage == lineage else 0
    count = 0
    while step - count > since:
        record = journal.step(lineage, step - count)
        if record is None or record.outcome is not Outcome.SKIPPED_NON_FINITE:
            break
        count += 1
    return count
