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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maskwire.v1.digest import initial_digest, step_digest
from maskwire_server import failpoints
from maskwire_server.batch import Payload
from maskwire_server.errors import RunDirectoryError
from maskwire_server.manifest import Manifest
from maskwire_server.results import Outcome, StepResult
from maskwire_server.run.ancestry import Segment, ancestry, on_path
from maskwire_server.run.checkpoint import Checkpoints
from maskwire_server.run.device import Device
from maskwire_server.run.journal import Journal, StepRecord

log = logging.getLogger(__name__)


class InexactReplayError(RunDirectoryError):
    """A step computed again gave another result than the one that was acknowledged."""


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
            _check_same_run(journal, run_dir, seed, canonical)
    except sqlite3.Error as error:
        journal.close()
        raise RunDirectoryError(f"{run_dir}: the journal cannot be written ({error}); make room") from error
    except BaseException:
        journal.close()
        raise
    return journal


def _check_same_run(journal: Journal, run_dir: Path, seed: int, canonical: bytes) -> None:
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
    checkpoints: Checkpoints, journal: Journal, segments: list[Segment]
) -> tuple[Manifest | None, list[str]]:
    """The newest whole checkpoint of the ancestry with its files intact, and what damaged ones lack.

    Raises RunDirectoryError when a checkpoint holds a step that the journal lost.
    """
    run_id = journal.fact("run_id")
    damaged = checkpoints.unreadable()
    for manifest in on_path(checkpoints.all(), segments):
        info = manifest.info
        if manifest.run_id != run_id:
            continue
        if digest_at(journal, info.lineage, info.step) != info.digest:
            raise RunDirectoryError(
                f"checkpoint {info.name!r} holds step {info.step} (lineage {info.lineage}), which the "
                "journal does not have: the journal lost acknowledged steps; restore it from a copy"
            )
        problem = checkpoints.damage(manifest)
        if problem is None:
            return manifest, damaged
        damaged.append(f"{info.name}: {problem}")
    return None, damaged


def digest_at(journal: Journal, lineage: int, step: int) -> bytes | None:
    """The digest that a lineage had after `step`, by the journal; None when it never got there."""
    start = journal.lineages().get(lineage)
    if start is not None and step == start.step:
        return start.digest
    record = journal.step(lineage, step)
    return None if record is None else record.digest


def steps_to_replay(
    journal: Journal, segments: list[Segment], start: tuple[int, int]
) -> Iterator[tuple[StepRecord, bytes | None]]:
    """The records behind (lineage, step) along the ancestry; the digest chain is checked on the way."""
    lineages = journal.lineages()
    began = False
    for segment in segments:
        began = began or segment.lineage == start[0]
        if not began:
            continue
        at = start[1] if segment.lineage == start[0] else lineages[segment.lineage].step
        digest = digest_at(journal, segment.lineage, at)
        for record, payload in journal.steps_after(segment.lineage, at):
            if segment.through is not None and record.step > segment.through:
                break
            at += 1
            expected = step_digest(digest or b"", segment.lineage, at, record.payload_hash, record.outcome)
            if record.step != at or record.digest != expected:
                raise RunDirectoryError(
                    f"journal: step {at} (lineage {segment.lineage}) is missing or does not continue the "
                    "history before it; restore the run directory from a copy"
                )
            digest = record.digest
            yield record, payload


FINGERPRINT = ("torch", "device", "threads", "precision", "world_size")


def fingerprint(versions: dict[str, str]) -> dict[str, Any]:
    """What a step's result depends on beside the configuration: software, hardware, threads."""
    return {f"fingerprint.{name}": versions[name] for name in FINGERPRINT if name in versions}


NUMERIC_SETTINGS = ("device", "precision", "threads", "micro_batch_tokens")


def numerics(configuration: dict[str, Any]) -> dict[str, Any]:
    """The part of the changeable configuration that a step's result depends on."""
    serve = configuration.get("serve", {})
    return {
        **{f"optimizer.{key}": value for key, value in configuration.get("optimizer", {}).items()},
        **{f"serve.{key}": serve.get(key) for key in NUMERIC_SETTINGS},
    }


def record_start(journal: Journal, versions: dict[str, str], settings: dict[str, Any]) -> int:
    """Record that a server instance takes the run over, and return its configuration's id."""
    last = journal.last_event("configuration")
    unchanged = last[0] if last is not None and last[1] == settings else None
    started: list[int] = []

    def write() -> None:
        journal.add_event("instance", {"versions": versions})
        started.append(unchanged or journal.add_event("configuration", settings))

    journal.transaction(write)
    return started[0]


@dataclass(frozen=True)
class Recovered:
    """Where the run is after recovery."""

    lineage: int
    step: int
    digest: bytes
    non_finite: int
    """Steps in a row, up to the last and since the last takeover, that were not finite."""


def recover(
    journal: Journal,
    checkpoints: Checkpoints,
    device: Device,
    settings: dict[str, Any],
    *,
    accept_inexact: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Recovered:
    """Bring the device's trainer to the journal's last step; `tell` hears what takes its time.

    Raises RunDirectoryError when that cannot be done exactly; nothing is changed then.
    """
    lineages = journal.lineages()
    lineage = max(lineages)
    segments = ancestry(lineages, lineage)
    for name in checkpoints.sweep():
        log.info("removed the unfinished checkpoint %s", name)
    manifest, damaged = newest_verified(checkpoints, journal, segments)
    failpoints.passing("recovery.chosen")
    for problem in damaged:
        log.warning("checkpoint passed over, its files are damaged: %s", problem)
    start = (segments[0].lineage, 0)
    if manifest is not None:
        info = manifest.info
        start = (info.lineage, info.step)
        tell(f"checkpoint {info.name}")
        loading = time.monotonic()
        try:
            device.call(partial(device.load, checkpoints.path(info.name), info.step))
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
        lambda section: device.call(partial(device.configure, section)),
        strict=not accept_inexact,
    )
    began = time.monotonic()
    count, inexact = replay(
        told(following.follow(records), step - start[1], tell),
        lambda *step: device.call(partial(device.replay, *step)),
        accept_inexact=accept_inexact,
    )
    if count:
        log.info("replayed %d steps in %.1f s", count, time.monotonic() - began)
    following.end()
    failpoints.passing("recovery.replayed")
    if inexact:
        journal.transaction(partial(journal.add_event, "inexact_replay", {"steps": inexact}))
    return Recovered(lineage, step, digest, _non_finite(journal, lineage, step))


def told(
    records: Iterator[tuple[StepRecord, bytes | None]], total: int, tell: Callable[[str], None]
) -> Iterator[tuple[StepRecord, bytes | None]]:
    """Pass the records on, and tell twice a second, and the log every ten, how far it is."""
    began = spoken = logged = time.monotonic()
    for count, item in enumerate(records):
        now = time.monotonic()
        if now - spoken >= 0.5 or not count:
            spoken = now
            speed = count / (now - began) if count else 0.0
            left = f", {(total - count) / speed:.0f} s left" if speed else ""
            words = f"the replay: step {item[0].step}, {count} of {total}{left}"
            tell(words)
            if now - logged >= 10:
                logged = now
                log.info("%s", words)
        yield item


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


class Following:
    """Puts each record's own [optimizer] section in force before it is computed again."""

    def __init__(
        self,
        journal: Journal,
        settings: dict[str, Any],
        configure: Callable[[dict[str, Any]], None],
        *,
        strict: bool,
    ) -> None:
        self._strict = strict
        self._journal = journal
        self._settings = settings
        self._configure = configure
        self._in_force = optimizer_section(settings)

    def follow(
        self, records: Iterator[tuple[StepRecord, bytes | None]]
    ) -> Iterator[tuple[StepRecord, bytes | None]]:
        """Pass the records on; RunDirectoryError at one whose settings cannot be followed."""
        for record, payload in records:
            if record.outcome is Outcome.APPLIED:
                self._follow(record, self._journal.event(record.configuration))
            yield record, payload

    def _follow(self, record: StepRecord, was: dict[str, Any]) -> None:
        changed = [
            f"{key} was {was[key]!r}"
            for key in sorted(
                was.keys() & self._settings.keys()
            )  # what an older version did not record is unknown
            if not key.startswith("optimizer.") and was[key] != self._settings[key]
        ]
        if changed and self._strict:
            raise _changed(record, ", ".join(changed))
        try:
            self._put_in_force(optimizer_section(was))
        except ValueError as error:
            raise _changed(record, str(error)) from error

    def end(self) -> None:
        """Go on under the configuration of now."""
        self._put_in_force(optimizer_section(self._settings))

    def _put_in_force(self, section: dict[str, Any]) -> None:
        if section != self._in_force:
            self._configure(section)
            self._in_force = section


def optimizer_section(settings: dict[str, Any]) -> dict[str, Any]:
    """The [optimizer] section within `numerics`."""
    prefix = "optimizer."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _changed(record: StepRecord, what: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"step {record.step} must be computed again, and what its result depends on changed since it was "
        f"trained ({what}): start once with it as it was, stop the server cleanly, then change it; or accept "
        "a result that may differ, once, with --accept-inexact-replay"
    )


def replay(
    records: Iterator[tuple[StepRecord, bytes | None]],
    train: Callable[[int, int, Payload], StepResult],
    *,
    accept_inexact: bool = False,
) -> tuple[int, list[int]]:
    """Compute the records' steps again: how many there were, and which were not exact.

    Skipped and failed steps changed nothing and are not computed. Raises InexactReplayError at the
    first step that differs, unless `accept_inexact`.
    """
    count, inexact = 0, []
    for record, payload in records:
        count += 1
        if record.outcome is not Outcome.APPLIED:
            continue
        if payload is None:
            raise RunDirectoryError(
                f"journal: the batch of step {record.step} was dropped behind a checkpoint that is gone or "
                "damaged; restore the run directory from a copy"
            )
        failpoints.passing("recovery.replaying")
        result = train(record.lineage, record.step, Payload.decode(payload))
        again = StepRecord(**{**vars(record), "losses": result.losses, "gradient_norm": result.gradient_norm})
        if result.outcome is record.outcome and again.numbers() == record.numbers():
            continue
        inexact.append(record.step)
        message = (
            f"step {record.step} computed again gave loss {result.losses.loss!r}, acknowledged was "
            f"{record.losses.loss!r}"
        )
        if not accept_inexact:
            raise InexactReplayError(
                f"{message}: software, hardware, threads or configuration differ from when it was trained; "
                "start as it was then, or accept the difference once with --accept-inexact-replay"
            )
        log.warning("%s; accepted", message)
    return count, inexact
