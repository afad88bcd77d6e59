"""The rules of `maskwire.v1` by which steps are admitted or refused, as pure functions.

Callers collect the facts under the run's mutex. These functions decide, without threads, clocks or files. A
decision is a return value, or a `Refused` that is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskwire.v1.digest import VERSIONS, newest_common
from maskwire.v1.values import RunState
from maskwire_server.errors import Refused
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import RestoreRequest, SaveRequest, SessionRef, StepRequest
from maskwire_server.session_holder import Holder


@dataclass(frozen=True)
class Known:
    """A step, in flight or recorded, that a request may be a retry of."""

    step: int | None
    """The step's number; None if it is in flight and has no number yet."""
    request_id: str | None
    payload_hash: bytes


@dataclass(frozen=True)
class Situation:
    """The facts about the run against which a request is checked."""

    state: RunState
    run_id: str
    lineage: int
    epoch: int
    """The newest epoch; 0 before the first."""
    writer: str
    """The name of the client whose session is open; empty if none is."""
    closed: bool
    """Whether the newest epoch's session was closed, by its client or by a restore; False if it expired."""
    next_step: int
    """The first step that is neither applied nor in flight."""
    window: int
    refused_step: int | None = None
    """The lowest step number that was refused and not taken by another step since."""
    holder: Holder | None = None
    """The client of the newest epoch, whether its session is open or not."""
    digest_version: int = 0
    """The version of the run's digest; 0 before the first step."""
    digest_version_provisional: bool = False
    """The run's first step is being computed: if it fails, it fixes no version."""
    digest_versions: tuple[int, ...] = VERSIONS
    """The digest versions that the client of the newest epoch supports."""

    @property
    def holder_facts(self) -> dict[str, Any]:
        """Error metadata about the client that opened the newest session."""
        return self.holder.metadata() if self.holder else {"epoch": self.epoch, "writer": self.writer}


_UNAVAILABLE = {
    RunState.RECOVERING: "the server is recovering the run",
    RunState.RESTORING: "a checkpoint is being restored",
    RunState.HELD: "training pauses until the journal's disk has space and the mirror can be written (the "
    "status says which it waits for); then it resumes by itself",
    RunState.DRAINING: "the server is shutting down",
}


def refuse_unavailable(state: RunState) -> None:
    """Raise Refused if the run is in a state in which the client should retry later."""
    if state in _UNAVAILABLE:
        raise Refused(state.name, f"{_UNAVAILABLE[state]}; retry with the same request id")
    if state is RunState.RECOVERY_FAILED:
        raise Refused(
            "RECOVERING", "recovery of the run failed; see the server's log, and restart the server"
        )


def mirror_fails() -> Refused:
    """Return the refusal (HELD) of a request whose answer waits for a mirror that cannot be written."""
    return Refused("HELD", "answers wait for the mirror, and the mirror cannot be written now; retry")


def shutting_down() -> Refused:
    """Return the refusal (DRAINING) of a request during shutdown."""
    return Refused("DRAINING", "the server is shutting down; retry with the same request id")


def refuse_full(queue_length: int, queue_limit: int) -> None:
    """Raise Refused (QUEUE_FULL) if the queue has reached its limit."""
    if queue_length >= queue_limit:
        raise Refused(
            "QUEUE_FULL",
            f"{queue_length} requests are queued, and the limit (serve.queue_limit) is {queue_limit}; retry "
            "with the same request id",
            queue_length=queue_length,
            queue_limit=queue_limit,
        )


def refuse_many_reads(waiting: int, limit: int) -> None:
    """Raise Refused (QUEUE_FULL) if too many evaluations and generations of one credential wait."""
    if waiting >= limit:
        raise Refused(
            "QUEUE_FULL",
            f"{waiting} evaluations and generations of this token or certificate already wait for the "
            "device; that is the limit (serve.max_reads_per_credential); retry",
            queue_length=waiting,
            queue_limit=limit,
        )


def read_too_long(what: str, seconds: float) -> Refused:
    """Return the refusal of an evaluation or generation that kept a step or a save waiting for too long."""
    return Refused(
        "READ_TOO_LONG",
        f"the {what} kept a training step or a save waiting for {seconds:g} s, the limit "
        "(serve.max_read_seconds), and was ended: send fewer or shorter rows, fewer draws or fewer passes in "
        "one call, wait until nothing trains, or raise the setting",
        max_read_seconds=f"{seconds:g}",
    )


def halted() -> Refused:
    """Return the refusal (HALTED) of a step after several steps that were not finite."""
    return Refused(
        "HALTED",
        "training is halted because the loss or gradient of three steps in a row was not finite; check the "
        "data and the learning rate, then open a session with takeover",
    )


def no_space(size: int) -> Refused:
    """Return the refusal (HELD) of a batch that does not fit on the journal's disk. A smaller one may fit."""
    return Refused(
        "HELD",
        f"the journal's disk has no space for this batch of {size} bytes; free some space, and training "
        "resumes",
        batch_bytes=size,
    )


def check_session(session: SessionRef, at: Situation) -> None:
    """Raise Refused unless `session` is the open session of this run and lineage."""
    if session.run_id != at.run_id or session.lineage != at.lineage:
        raise Refused(
            "WRONG_RUN",
            f"the session belongs to run {session.run_id!r}, lineage {session.lineage}, but this server has "
            f"run {at.run_id!r}, lineage {at.lineage}: open a new session",
            run_id=at.run_id,
            lineage=at.lineage,
            session_run_id=session.run_id,
            session_lineage=session.lineage,
        )
    if session.epoch < at.epoch:
        raise fenced(session.epoch, at)
    if session.epoch > at.epoch or session.epoch < 1 or at.closed:
        why = "was closed" if session.epoch == at.epoch and at.closed else "was never issued for this run"
        raise Refused(
            "UNKNOWN_EPOCH",
            f"session epoch {session.epoch} {why} (the newest is {at.epoch}): open a new session",
            epoch=at.epoch,
            session_epoch=session.epoch,
        )


def fenced(epoch: int, at: Situation) -> Refused:
    """Return the refusal (FENCED) of a client whose session is not the newest."""
    return Refused(
        "FENCED",
        f"session epoch {epoch} was superseded: {who(at)} took over (epoch {at.epoch}); stop this client",
        session_epoch=epoch,
        **at.holder_facts,
    )


def writer_present(at: Situation, cure: str) -> Refused:
    """Return the refusal (WRITER_PRESENT) of a client while another client's session is open."""
    where = at.holder.where if at.holder else ""
    return Refused(
        "WRITER_PRESENT", f"client {at.writer!r} has a session open{where}; {cure}", **at.holder_facts
    )


def check_writer(session: SessionRef | None, at: Situation) -> None:
    """Raise Refused unless a step of `session` (if None, of no session) may be trained now."""
    if session is not None:
        check_session(session, at)
        check_digest_version(at.digest_versions, at)
    elif at.writer:
        raise writer_present(at, "send the request in that session, or wait until it is closed or idle")


def check_digest_version(offered: Sequence[int], at: Situation) -> None:
    """Raise Refused (DIGEST_VERSION) unless `offered` includes the run's digest version.

    Before the first step, any version that the server supports is accepted. While the first step is being
    computed, the client is asked to retry.
    """
    version = at.digest_version
    if version not in offered and (version or not newest_common(offered)):
        refusal = other_digest_version(offered, version)
        if at.digest_version_provisional:
            refusal.retry_after_seconds = 0.5
        raise refusal


def check_segments(request: StepRequest, version: int) -> None:
    """Raise Refused (DIGEST_VERSION) for segment ids if the run's digest version does not cover them."""
    if request.payload.batch.segment_ids is not None and version < 2:
        raise Refused(
            "DIGEST_VERSION",
            f"batch.segment_ids needs digest version 2, and the run has version {version}: send each segment "
            "as a row of its own, with lengths, or start a new run",
            digest_version=version,
        )


def other_digest_version(offered: Sequence[int], version: int) -> Refused:
    """Return the refusal (DIGEST_VERSION) of a client that does not support the run's digest version."""
    wanted = str(version) if version else " or ".join(map(str, VERSIONS))
    computed = ", ".join(map(str, offered))
    return Refused(
        "DIGEST_VERSION",
        f"the run uses digest version {wanted}, which this client does not support (it supports {computed}); "
        "use a client that does",
        digest_version=version,
        client_digest_versions=computed,
    )


def repeats(request: StepRequest, payload_hash: bytes, known: Known) -> bool:
    """Whether a request is a retry of a known step.

    Steps are compared by request id and payload hash. A session's request without an id is compared by hash
    alone. Raises Refused (PAYLOAD_MISMATCH) if only the id is the same.
    """
    same_hash = payload_hash == known.payload_hash
    if request.request_id is not None and request.request_id == known.request_id:
        same_step = request.step is None or known.step is None or request.step == known.step
        if same_hash and same_step:
            return True
        raise other_step(known.step, "another step" if same_hash else "another payload")
    return request.request_id is None and request.session is not None and same_hash


def other_step(step: int | None, what: str = "another step") -> Refused:
    """Return the refusal (PAYLOAD_MISMATCH) of a request whose id was used for another step or payload."""
    of_step = f" (step {step})" if step else ""
    return Refused(
        "PAYLOAD_MISMATCH",
        f"this request id was used for {what}{of_step}; use a new id for a new request",
        step=step,
    )


def other_save(request: SaveRequest) -> Refused:
    """Return the refusal (PAYLOAD_MISMATCH) of a save whose request id was used for another save."""
    name = request.name or "without a name"
    return Refused(
        "PAYLOAD_MISMATCH",
        f"this request id was used to save a checkpoint ({name}) with other arguments; use a new id for a "
        "new request",
        name=name,
    )


def step_taken(step: int, next_step: int) -> Refused:
    """Return the refusal (STEP_TAKEN) of a step whose number was taken by another request."""
    return Refused(
        "STEP_TAKEN",
        f"step {step} was applied, or is in flight, under another request id; the next free number is "
        f"{next_step}",
        step=step,
        expected_step=next_step,
    )


def admit_step(step: int | None, queue_length: int, queue_limit: int, at: Situation) -> bool:
    """Whether a new step that asks for number `step` is next. If not, it must wait for another step.

    A new step is not a retry. The checks are in the order that the protocol defines. Raises Refused.
    """
    if at.refused_step is not None and step is not None and step > at.refused_step:
        raise gap(step, at.refused_step)
    ahead = 0 if step is None else step - at.next_step
    if ahead >= at.window:
        raise gap(step, at.next_step)
    refuse_full(queue_length, queue_limit)
    refuse_unavailable(at.state)
    if at.state is RunState.HALTED:
        raise halted()
    return ahead <= 0


def refuse_unexpected(request: SaveRequest | RestoreRequest, position: HistoryPosition) -> None:
    """Raise Refused (WRONG_RUN) unless the run is at the lineage and step that the request expects."""
    for name, expected, actual in (
        ("lineage", request.expected_lineage, position.lineage),
        ("step", request.expected_step, position.step),
    ):
        if expected is not None and expected != actual:
            raise Refused(
                "WRONG_RUN",
                f"expected_{name} is {expected}, but the run is at {name} {actual}; check the run's status, "
                "and send a new request",
                lineage=position.lineage,
                step=position.step,
            )


def gap(step: int | None, expected: int) -> Refused:
    """Return the refusal (GAP) of a step whose predecessor was refused, abandoned, or has not arrived."""
    return Refused(
        "GAP",
        f"step {step} is ahead of step {expected}, which was refused or has not arrived; send step "
        f"{expected} again or, if it was refused, renumber the later steps from {expected} on",
        step=step,
        expected_step=expected,
    )


def who(at: Situation) -> str:
    """Describe the client of the newest session in words, for messages."""
    return str(at.holder) if at.holder else repr(at.writer) if at.writer else "another writer"
