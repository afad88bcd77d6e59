"""Replay: recorded steps are read along the ancestry, computed again, and compared with their records."""

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
    """A recomputed step gave a result that differs from the acknowledged one."""


def recorded_version(journal: Journal) -> DigestVersion:
    """The version of the run's digest; for a run without steps, where any will do, the first one."""
    return journal.digest_version() or DigestVersion(VERSIONS[0])


def read_payload(record: StepRecord, encoded: bytes, version: DigestVersion) -> Payload:
    """Decode a step's batch. Raises RunDirectoryError when it does not match the step's payload hash."""
    try:
        payload = Payload.decode(encoded)
        whole = payload.hash(version) == record.payload_hash
    except Exception:  # decoding damaged data can raise any of these
        whole = False
    if not whole:
        raise damaged(f"the batch of step {record.step} (lineage {record.lineage})")
    return payload


def steps_to_replay(
    journal: Journal, segments: list[Segment], start: tuple[int, int]
) -> Iterator[tuple[StepRecord, bytes | None]]:
    """The records after (lineage, step) along the ancestry; RunDirectoryError where the chain breaks."""
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
                f"journal: step {at + 1} (lineage {segment.lineage}), from which a later one descends, is "
                "missing; restore the run directory from a copy"
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
    """The steps among these that no tolerance covers and that were accepted."""
    stretches: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By lineage, the first and last step whose weights are close to the run's but not the same bytes."""
    accepted: bool = False
    """Whether something that no tolerance covers was accepted."""
    load_seconds: float = 0.0
    """The time to load the checkpoint from which the replay started."""
    seconds: float = 0.0
    """The time of the replay."""

    @property
    def inexact(self) -> list[InexactReplay]:
        """The ranges in `stretches`, as they are recorded in the journal."""
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

    `tolerance` is called for each step with the learning rate of its batch; None requires the recorded bytes.
    Skipped and failed steps changed nothing and are not computed. Raises InexactReplayError at the first step
    that differs by more, unless `accept_inexact`, and always at a step with a different outcome.
    """
    done = Replayed()
    for record, payload in records:
        done.count += 1
        if record.outcome is not Outcome.APPLIED:
            continue
        if payload is None:
            raise RunDirectoryError(
                f"journal: the batch of step {record.step} is not kept, and no complete checkpoint lies "
                'between it and the step asked for: serve.keep_payloads = "all" keeps every batch; where a '
                "checkpoint was damaged, restore the run directory from a copy"
            )
        failpoints.passing("recovery.replaying")
        sent = read_payload(record, payload, version)
        result = train(record.lineage, record.step, sent.batch, sent.modes)
        if outcome_differs(record, result):
            raise InexactReplayError(
                f"step {record.step} was acknowledged as {record.outcome.name}, but recomputing it gave "
                f"{result.outcome.name}. Start the server with the software, hardware and settings that "
                "trained it"
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
            problem: str | None = f"loss {result.losses.loss!r}, acknowledged was {record.losses.loss!r}"
        else:
            problem = excess(record, result, allowed, sent.batch.tokens)
        if problem is None:
            continue
        message = f"step {record.step} computed again gave {problem}"
        if not accept_inexact:
            raise InexactReplayError(
                f"{message}: software, hardware, threads, configuration or checkpoint differ from when it "
                "was trained; start with the same ones, or accept it once with --accept-inexact-replay"
            )
        done.beyond.append(record.step)
        log.warning("%s; accepted", message)
    if done.differing > len(done.beyond):
        log.info(
            "recomputed steps that differ from the record, within the tolerance: %d",
            done.differing - len(done.beyond),
        )
    return done
