"""Recorded steps computed again: read along the ancestry, checked on the way, held against the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from maskwire.v1.digest import step_digest
from maskwire_server import failpoints
from maskwire_server.batch import Payload
from maskwire_server.errors import RunDirectoryError
from maskwire_server.results import Outcome, StepResult
from maskwire_server.run.ancestry import Segment
from maskwire_server.run.journal import Journal
from maskwire_server.run.records import StepRecord, damaged

log = logging.getLogger(__name__)


class InexactReplayError(RunDirectoryError):
    """A step computed again gave another result than the one that was acknowledged."""


def digest_at(journal: Journal, lineage: int, step: int) -> bytes | None:
    """The digest that a lineage had after `step`, by the journal; None when it never got there."""
    start = journal.lineages().get(lineage)
    if start is not None and step == start.step:
        return start.digest
    record = journal.step(lineage, step)
    return None if record is None else record.digest


def read_payload(record: StepRecord, encoded: bytes) -> Payload:
    """A step's kept batch. Raises RunDirectoryError when it is not the one that the step hashed."""
    try:
        payload = Payload.decode(encoded)
        whole = payload.hash() == record.payload_hash
    except Exception:  # whatever damaged bytes make of it
        whole = False
    if not whole:
        raise damaged(f"the batch of step {record.step} (lineage {record.lineage})")
    return payload


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
        if segment.through is not None and at < segment.through:
            raise RunDirectoryError(
                f"journal: step {at + 1} (lineage {segment.lineage}), from which a later one descends, is "
                "missing; restore the run directory from a copy"
            )


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
                f"journal: the batch of step {record.step} is not kept, and no whole checkpoint lies between "
                'it and the step asked for: serve.keep_payloads = "all" keeps every batch; where a '
                "checkpoint was damaged, restore the run directory from a copy"
            )
        failpoints.passing("recovery.replaying")
        result = train(record.lineage, record.step, read_payload(record, payload))
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
