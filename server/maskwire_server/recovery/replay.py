"""Replay: computes the recorded steps of a run again and compares the results with the records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from maskwire.v1.digest import VERSIONS, DigestVersion, step_digest
from maskwire.v1.values import InexactReplay, Outcome
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.ancestry import Segment
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord, damaged
from maskwire_server.recovery.tolerance import Tolerance, excess, outcome_differs
from maskwire_server.results import StepResult

log = logging.getLogger(__name__)


class InexactReplayError(RunDirectoryError):
    """A recomputed step gave a result that differs from the acknowledged result."""


def recorded_version(journal: Journal) -> DigestVersion:
    """The digest version that the run uses; the first version if the run has no steps yet."""
    return journal.digest_version() or DigestVersion(VERSIONS[0])


def read_payload(record: StepRecord, encoded: bytes, version: DigestVersion) -> Payload:
    """Decode a step's batch. Raises RunDirectoryError if it does not match the recorded payload hash."""
    try:
        payload = Payload.decode(encoded)
        whole = payload.hash(version) == record.payload_hash
    except Exception:  # decoding damaged data can raise any exception
        whole = False
    if not whole:
        raise damaged(f"the batch of step {record.step} (lineage {record.lineage})")
    return payload


def steps_to_replay(
    journal: Journal, segments: list[Segment], start: tuple[int, int]
) -> Iterator[tuple[StepRecord, bytes | None]]:
    """Yield the records of the steps after `start` in the ancestry `segments`, with their encoded batches.

    `start` is a lineage and a step. Raises RunDirectoryError where a record is missing or does not fit the
    digest of the step before it.
    """
    lineages = journal.lineages()
    began = False
    for segment in segments:
        began = began or segment.lineage == start[0]
        if not began:
            continue
        at = start[1] if segment.lineage == start[0] else lineages[segment.lineage].step
        digest = journal.digest_at(segment.lineage, at)
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
                f"journal: step {at + 1} (lineage {segment.lineage}) is missing, although later steps build "
                "on it; restore the run directory from a copy"
            )


def with_progress(
    records: Iterator[tuple[StepRecord, bytes | None]], total: int, tell: Callable[[str], None]
) -> Iterator[tuple[StepRecord, bytes | None]]:
    """Yield the records; report progress to `tell` twice per second and to the log every ten seconds."""
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


@dataclass
class Replayed:
    """The outcome of a replay."""

    count: int = 0
    """The number of steps, including those that changed nothing."""
    differing: int = 0
    """How many results differed from the recorded bytes."""
    beyond: list[int] = field(default_factory=list)
    """Those of the differing steps that exceeded the tolerance and were accepted all the same."""
    stretches: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By lineage, the first and last step after which the weights may differ from the run's."""
    accepted: bool = False
    """Whether a difference beyond the tolerance, or a changed fingerprint, was accepted."""
    load_seconds: float = 0.0
    """The time to load the checkpoint from which the replay started."""
    seconds: float = 0.0
    """The time of the replay."""

    @property
    def inexact(self) -> list[InexactReplay]:
        """The ranges in `stretches`, in the form that the journal records."""
        return [InexactReplay(lineage, *steps, self.accepted) for lineage, steps in self.stretches.items()]


def replay(
    records: Iterator[tuple[StepRecord, bytes | None]],
    train: Callable[[int, int, Batch, Modes], StepResult],
    *,
    version: DigestVersion,
    tolerance: Callable[[float | None], Tolerance | None] = lambda _: None,
    accept_inexact: bool = False,
) -> Replayed:
    """Compute recorded steps again, and compare each result with its record.

    `tolerance` is called for each computed step with the learning rate in its request. If it returns None,
    the result must equal the recorded bytes. Skipped and failed steps changed nothing and are not computed.
    Raises InexactReplayError at the first step with another outcome and, unless `accept_inexact` is set, at
    the first step beyond the tolerance. Raises RunDirectoryError if a batch is missing or damaged.
    """
    done = Replayed()
    for record, payload in records:
        done.count += 1
        if record.outcome is not Outcome.APPLIED:
            continue
        if payload is None:
            raise RunDirectoryError(
                f"journal: step {record.step} cannot be computed again: its batch was deleted, and no intact "
                "checkpoint lies between it and the step to rebuild; restore the run directory from a copy "
                'or, with `replay`, choose a later step. serve.keep_payloads = "all" keeps all new batches'
            )
        failpoints.passing("recovery.replaying")
        sent = read_payload(record, payload, version)
        result = train(record.lineage, record.step, sent.batch, sent.modes)
        if outcome_differs(record, result):
            raise InexactReplayError(
                f"step {record.step} was acknowledged as {record.outcome.name}, but recomputing it gave "
                f"{result.outcome.name}; start the server with the software, hardware and settings that the "
                "step was trained with"
            )
        again = StepRecord(**{**vars(record), "losses": result.losses, "gradient_norm": result.gradient_norm})
        same, allowed = again.numbers() == record.numbers(), tolerance(sent.modes.learning_rate)
        if same and allowed is None and not done.stretches:
            continue
        # The loss is computed before the update: an equal loss does not show that the new weights are equal.
        first, _ = done.stretches.get(record.lineage, (record.step, record.step))
        done.stretches[record.lineage] = first, record.step
        if same:
            continue
        done.differing += 1
        if allowed is None:
            problem: str | None = f"loss {result.losses.loss!r}, but {record.losses.loss!r} was acknowledged"
        else:
            problem = excess(record, result, allowed, sent.batch.tokens)
        if problem is None:
            continue
        message = f"step {record.step} computed again gave {problem}"
        if not accept_inexact:
            raise InexactReplayError(
                f"{message}: the software, hardware, thread count, configuration or checkpoint has changed "
                "since the step was trained; start with what it was trained with, or accept the difference "
                "once with --accept-inexact-replay"
            )
        done.beyond.append(record.step)
        log.warning("%s; accepted, as --accept-inexact-replay is set", message)
    if done.differing > len(done.beyond):
        log.info(
            "recomputed steps that differ from the record, within the tolerance: %d",
            done.differing - len(done.beyond),
        )
    return done
