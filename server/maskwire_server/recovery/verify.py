"""Verification and inspection of a run directory, without a device.

    verify    checks every record's hash, the digest chain of every lineage, each stored batch, and the
              files of each checkpoint
    inspect   reads one step: its batch, outcome, losses and gradient norm

Neither changes the run, except that SQLite merges its write-ahead log into the database, and that a journal
of an older format is migrated, as at the start of a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwire.v1.digest import initial_digest, lineage_digest, step_digest
from maskwire.v1.values import InexactReplay, Outcome
from maskwire_server.batch import Payload
from maskwire_server.checkpoints.provenance import Provenance
from maskwire_server.checkpoints.retention import FALLBACKS, on_path
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import ancestry, lineage_of
from maskwire_server.journal.database import explained
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, StepRecord
from maskwire_server.recovery.boot import open_recorded
from maskwire_server.recovery.initial_weights import require_source
from maskwire_server.recovery.replay import read_payload, recorded_version, steps_to_replay
from maskwire_server.results import CheckpointInfo


@dataclass
class Audit:
    """The findings of `verify`."""

    run_id: str = ""
    lineage: int = 0
    step: int = 0
    """The last step of the newest lineage."""
    digest: str = ""
    lineages: int = 0
    steps: int = 0
    batches: int = 0
    """The number of steps whose batch is stored."""
    checkpoints: list[str] = field(default_factory=list)
    """The names of the intact checkpoints, newest first."""
    inexact_replays: list[InexactReplay] = field(default_factory=list)
    """Steps that a server recomputed at its start, with results that may differ from the recorded bytes."""
    problems: list[str] = field(default_factory=list)


def verify(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> Audit:
    """Check a run without computing steps. Raises RunDirectoryError if the directory holds no run."""
    journal = open_recorded(run_dir)
    try:
        with explained(run_dir):
            audit = Audit(run_id=journal.fact("run_id"))
            lineages = journal.lineages()
        if not lineages:
            raise RunDirectoryError(
                f"{run_dir}: the journal has no history; restore the run directory from a copy"
            )
        at = {}
        for lineage in lineages.values():
            with _noted(audit, run_dir):
                _verify_start(journal, lineage, lineages, audit)
            at[lineage.lineage] = lineage.step, lineage.digest.hex()
            with _noted(audit, run_dir):
                for record in _verified_steps(journal, lineage, audit, tell):
                    at[lineage.lineage] = record.step, record.digest.hex()
        audit.lineages, audit.lineage = len(lineages), max(lineages)
        audit.step, audit.digest = at[audit.lineage]
        with _noted(audit, run_dir):
            audit.inexact_replays += inexact_replays.recorded(journal)
        with _noted(audit, run_dir):
            audit.problems += journal.damage()
        with _noted(audit, run_dir):
            _verify_checkpoints(journal, Checkpoints(run_dir), audit, tell)
        with _noted(audit, run_dir):
            _verify_recovery(journal, Checkpoints(run_dir), lineages, audit)
        return audit
    finally:
        journal.close()


def _verify_start(journal: Journal, lineage: Lineage, lineages: dict[int, Lineage], audit: Audit) -> None:
    if lineage.parent is None:
        expected: bytes | None = initial_digest(journal.fact("canonical"), journal.fact("seed"))
    elif lineage.parent in lineages:
        parent = journal.digest_at(lineage.parent, lineage.step)
        expected = None if parent is None else lineage_digest(parent, lineage.lineage)
    else:
        expected = None
    if lineage.digest != expected:
        audit.problems.append(f"lineage {lineage.lineage} does not begin with its parent's digest")


@contextlib.contextmanager
def _noted(audit: Audit, run_dir: Path) -> Iterator[None]:
    """A context manager that adds a RunDirectoryError of its body to the problems of the audit."""
    try:
        with explained(run_dir):
            yield
    except RunDirectoryError as error:
        if str(error) not in audit.problems:
            audit.problems.append(str(error))


def _verified_steps(
    journal: Journal, lineage: Lineage, audit: Audit, tell: Callable[[str], None]
) -> Iterator[StepRecord]:
    at, digest, version = lineage.step, lineage.digest, recorded_version(journal)
    for record, encoded in journal.steps_after(lineage.lineage, at):
        at += 1
        digest = step_digest(digest, lineage.lineage, at, record.payload_hash, record.outcome)
        if record.step != at or record.digest != digest:
            audit.problems.append(
                f"step {at} (lineage {lineage.lineage}) is missing or does not continue the history before it"
            )
            at, digest = record.step, record.digest
        if encoded is not None:
            audit.batches += 1
            try:
                read_payload(record, encoded, version)
            except RunDirectoryError as error:
                audit.problems.append(str(error))
        audit.steps += 1
        if audit.steps % 10_000 == 0:
            tell(f"{audit.steps} steps")
        yield record


def _verify_checkpoints(
    journal: Journal, checkpoints: Checkpoints, audit: Audit, tell: Callable[[str], None]
) -> None:
    found = checkpoints.all()
    provenance = Provenance()
    provenance.look_up(journal, found)
    for manifest in found:
        info = manifest.info
        tell(f"checkpoint {info.name}")
        problem = provenance.problem(manifest) or checkpoints.damage(manifest)
        if problem is None:
            audit.checkpoints.append(info.name)
        else:
            audit.problems.append(f"checkpoint {info.name}: {problem}")
    gone = journal.checkpoints().keys() - {manifest.info.name for manifest in found}
    for name in sorted(gone):
        tell(f"checkpoint {name}: no longer in checkpoints/")
    for name, problem in checkpoints.unreadable().items():
        audit.problems.append(f"checkpoint {name}: {problem}")
    unfinished = checkpoints.unfinished()
    if unfinished:
        tell(f"unfinished checkpoints, deleted at the next start: {', '.join(unfinished)}")


def _verify_recovery(
    journal: Journal, checkpoints: Checkpoints, lineages: dict[int, Lineage], audit: Audit
) -> None:
    """Check that the batches of all steps after the newest intact checkpoints are stored, for a recovery."""
    segments = ancestry(lineages, max(lineages))
    whole = set(audit.checkpoints)
    path = [m.info for m in on_path(checkpoints.all(), segments) if m.info.name in whole]
    if not path:
        require_source(journal)
    # A start uses the newest checkpoint, or the second-newest if the newest is damaged.
    bases: list[CheckpointInfo | None] = [*path[:FALLBACKS]]
    for info in bases or [None]:
        start = (segments[0].lineage, 0) if info is None else (info.lineage, info.step)
        behind = f"checkpoint {info.name}" if info else "the run's beginning (no complete checkpoint is left)"
        for record, encoded in steps_to_replay(journal, segments, start):
            if encoded is None and record.outcome is Outcome.APPLIED:
                audit.problems.append(
                    f"the batch of step {record.step} (lineage {record.lineage}), after {behind}, was "
                    "dropped: the run cannot be recovered from there"
                )
                break


@dataclass(frozen=True)
class Inspected:
    """A recorded step with its batch and settings."""

    record: StepRecord
    payload: Payload | None
    """None if the batch was deleted because checkpoints cover the step."""
    settings: dict[str, Any]
    """The settings that the step's result depends on, besides model, objective and seed."""


def inspect(run_dir: Path, step: int, lineage: int | None = None) -> Inspected:
    """Read a step of the given lineage or, without one, of the current history. Raises RunDirectoryError."""
    journal = open_recorded(run_dir)
    try:
        lineages = journal.lineages()
        if lineage is None:
            lineage = lineage_of(ancestry(lineages, max(lineages)), step)
        record = journal.step(lineage, step)
        if record is None:
            last = journal.last_step(max(lineages))
            raise RunDirectoryError(
                f"{run_dir}: there is no step {step} (lineage {lineage}); the run's last step is "
                f"{last.step if last else lineages[max(lineages)].step} (lineage {max(lineages)})"
            )
        payload = next((p for r, p in journal.steps_after(lineage, step - 1) if r.step == step), None)
        return Inspected(
            record,
            None if payload is None else read_payload(record, payload, recorded_version(journal)),
            journal.event(record.configuration),
        )
    finally:
        journal.close()
