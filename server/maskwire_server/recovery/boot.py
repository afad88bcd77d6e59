"""Opens a run, and recovers it to its last durable step."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maskwire.v1.digest import initial_digest, lineage_digest
from maskwire.v1.values import Outcome
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import ancestry
from maskwire_server.journal.database import JournalError
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, SessionRecord
from maskwire_server.journal.run_directory import JOURNAL_FILE
from maskwire_server.recovery.rebuild import rebuild
from maskwire_server.recovery.trainer_interface import ReplayTrainer

log = logging.getLogger(__name__)


def open_journal(run_dir: Path, *, seed: int, canonical: bytes, durable: bool = True) -> Journal:
    """Open the journal of a directory's run, or create a run if the directory is empty.

    Raises RunDirectoryError if the directory holds another run, or other files.
    """
    journal = Journal(run_dir, durable=durable)
    try:
        if journal.is_new:
            facts = {"run_id": uuid.uuid4().hex, "seed": seed, "canonical": canonical}
            journal.create(facts, initial_digest(canonical, seed))
        else:
            check_same_run(journal, run_dir, seed, canonical)
    except JournalError as error:
        journal.close()
        raise RunDirectoryError(
            f"{run_dir}: the journal cannot be written ({error}); free space on its disk, and start again"
        ) from error
    except BaseException:
        journal.close()
        raise
    return journal


def open_recorded(run_dir: Path) -> Journal:
    """Open the journal of a directory's run. Raises RunDirectoryError if there is no run."""
    if not (run_dir / JOURNAL_FILE).is_file():
        raise RunDirectoryError(
            f"{run_dir}: there is no run here ({JOURNAL_FILE} is missing); check this path, which comes from "
            "the command, --run-dir or run.dir"
        )
    return Journal(run_dir)


def check_same_run(journal: Journal, run_dir: Path, seed: int, canonical: bytes) -> None:
    """Raise RunDirectoryError, naming each difference, unless seed, model and objective match the run."""
    differences = []
    if journal.fact("seed") != seed:
        differences.append(f"run.seed is {journal.fact('seed')} in the run, but {seed} in the configuration")
    recorded, configured = json.loads(journal.fact("canonical")), json.loads(canonical)
    for section in recorded.keys() | configured.keys():
        was, now = recorded.get(section, {}), configured.get(section, {})
        differences += [
            f"{section}.{key} is {was.get(key)!r} in the run, but {now.get(key)!r} in the configuration"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
    if differences:
        raise RunDirectoryError(
            f"{run_dir}: {'; '.join(differences)}; the model, objective and seed of a run cannot change: "
            "restore the recorded values, or start a new run in an empty directory"
        )


@dataclass(frozen=True)
class Recovered:
    """The end of a run's history after recovery."""

    lineage: int
    step: int
    digest: bytes
    non_finite: int
    """How many of the newest steps in a row were not finite, counted since the last takeover."""
    replayed_inexactly: bool
    """Whether the state comes from an inexact replay: it must then be saved before any training or answer."""
    accepted: bool
    """Whether a difference beyond the tolerance was accepted."""
    load_seconds: float = 0.0
    """The time to load the checkpoint."""
    replay_seconds: float = 0.0
    """The time to recompute the steps after it."""


def recover(
    journal: Journal,
    checkpoints: Checkpoints,
    trainer: ReplayTrainer,
    settings: dict[str, Any],
    *,
    accept_inexact: bool = False,
    accept_lost: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    when_space: Callable[[Callable[[], None]], None] = lambda write: write(),
) -> Recovered:
    """Bring the trainer to the journal's last step, and set unusable checkpoints aside.

    `tell` is called with texts about the progress. `when_space` calls a function that writes to the journal,
    and may wait until the disk has space. Raises RunDirectoryError if the last step cannot be recomputed, and
    InexactReplayError if a recomputed step differs too much from the recorded one.
    """
    lineages = journal.lineages()
    lineage = max(lineages)
    segments = ancestry(lineages, lineage)
    if journal.missing_requests(lineage):
        log.warning("the journal's index of request ids was damaged and is rebuilt from the records")
        when_space(partial(journal.transaction, journal.rebuild_request_index))
    for name in checkpoints.sweep():
        log.info("removed the unfinished checkpoint %s", name)
    lineage_start = lineages[lineage]
    last = journal.last_step(lineage)
    step, digest = (last.step, last.digest) if last else (lineage_start.step, lineage_start.digest)

    def set_aside(name: str, problem: str) -> None:
        try:
            aside = f"moved to {checkpoints.set_aside(name)}"
        except OSError as error:
            aside = f"left in place ({error.strerror})"
        log.warning("checkpoint %s cannot be used and was %s: %s", name, aside, problem)

    rebuilt = rebuild(
        journal,
        checkpoints,
        trainer,
        settings,
        segments,
        step,
        accept_inexact=accept_inexact,
        accept_lost=accept_lost,
        on_unusable_checkpoint=set_aside,
        tell=tell,
    )
    inexact = rebuilt.inexact
    if inexact:
        when_space(partial(inexact_replays.record, journal, inexact, rebuilt.beyond))
    non_finite = _non_finite(journal, lineage, step)
    return Recovered(
        lineage,
        step,
        digest,
        non_finite,
        bool(inexact),
        rebuilt.accepted,
        rebuilt.load_seconds,
        rebuilt.seconds,
    )


def accept_lost_history(
    journal: Journal,
    recovered: Recovered,
    step: int,
    *,
    when_space: Callable[[Callable[[], None]], None] = lambda write: write(),
) -> Recovered:
    """Continue from the last surviving step on a new lineage, so that clients notice the loss.

    Raises RunDirectoryError unless `step` is that step. A second call for the same step changes nothing.
    """
    current = journal.lineages()[recovered.lineage]
    if recovered.step != step:
        raise RunDirectoryError(
            f"--accept-lost-history {step}: the run is at step {recovered.step}; name that step to "
            "continue from it, or leave the option out"
        )
    if current.parent is not None and current.checkpoint is None and current.step == step:
        return recovered
    number = recovered.lineage + 1
    digest = lineage_digest(recovered.digest, number)
    last = journal.last_session()

    def write() -> None:
        journal.add_lineage(Lineage(number, recovered.lineage, step, digest, None, None))
        journal.add_event("accepted_lost_history", {"lineage": number, "step": step})
        epoch = (last.epoch if last else 0) + 1  # a new epoch fences the writer of the old lineage
        journal.add_session(SessionRecord(epoch, "lost history", None, False, number, step, True))

    when_space(partial(journal.transaction, write))
    log.warning("lost history accepted: lineage %d continues from step %d", number, step)
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
