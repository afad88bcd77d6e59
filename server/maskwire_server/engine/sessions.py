"""OpenSession and CloseSession: one writer at a time, and a durable epoch for each."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from maskwire_server import failpoints
from maskwire_server.engine import admission
from maskwire_server.engine.admission import SessionFacts
from maskwire_server.engine.commits import CLIENT_PROCESS, Events, EventsCommit, SessionCommit, SessionEnd
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Step, Takeover
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.run import Run
from maskwire_server.errors import Refused, invalid_field
from maskwire_server.holder import ClientProcess, Holder
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import SessionRecord
from maskwire_server.recovery.replay import digest_at
from maskwire_server.requests import SessionRef, SessionRequest
from maskwire_server.results import RunState, SessionAnswer

EVALUATED = "evaluated"
"""The kind of event that keeps which step a writer has evaluated."""
DIGEST_VERSIONS = "digest_versions"
"""The kind of event that keeps which versions of the digest a session's client computes."""


@dataclass(frozen=True)
class Recorded:
    """What the journal knows of a request to open a session."""

    epoch: int | None
    """The epoch that its nonce was given."""
    digest: bytes | None
    """The digest at the client's last step."""


@dataclass(frozen=True)
class SessionRead:
    """Asks the journal about a request to open a session."""

    nonce: str
    lineage: int
    step: int | None

    def read(self, journal: Journal) -> Recorded:
        """Look nonce and step up."""
        given = journal.session_of_nonce(self.nonce)
        digest = None if self.step is None else digest_at(journal, self.lineage, self.step)
        return Recorded(given.epoch if given else None, digest)


class Sessions:
    """`open` and `close` are for the threads of callers, `record` for the executor's."""

    def __init__(self, run: Run, committer: Committer) -> None:
        self._run = run
        self._committer = committer
        self._opening: dict[str, list[Future[SessionAnswer]]] = {}  # by nonce, until durable

    def open(self, request: SessionRequest, future: Future[SessionAnswer]) -> None:
        """Make the caller the writer: fence the one before at once, answer once the epoch is durable."""
        run = self._run
        with run.mutex:
            if request.nonce in self._opening:  # the same call again
                self._opening[request.nonce].append(future)
                return
            self._opening[request.nonce] = [future]
        step = None if request.history is None else request.history.step
        try:
            read = self._committer.read(SessionRead(request.nonce, run.head.computed.lineage, step))
            recorded = read.result()
            with run.mutex:
                self._admit(request, recorded)
        except Refused as refusal:
            self._refuse(request.nonce, refusal)

    def _admit(self, request: SessionRequest, recorded: Recorded) -> None:
        """Raise the epoch and queue its record, or give the nonce's own epoch again; under the mutex."""
        run, at = self._run, self._run.situation()
        durable = run.head.durable.step
        # What was said before anything was trained can still be corrected.
        trained = run.next_number > 1
        facts = SessionFacts(
            request,
            recorded.epoch,
            durable,
            recorded.digest,
            run.head.tokenizer if trained else "",
            run.head.data if trained else {},
        )
        new = admission.admit_session(facts, at)
        if request.evaluated_step > durable:
            raise invalid_field(
                "evaluated_step",
                f"evaluated_step must be at most the durable step {durable}, got {request.evaluated_step}",
            )
        if not new:
            run.lease.touch()
            events = self._keep(request)
            futures = self._opening.pop(request.nonce)
            reply = self._answer(at.epoch)
            for future in futures[1:]:
                self._committer.append(EventsCommit(future, reply))
            self._committer.append(EventsCommit(futures[0], reply, events))
            return
        epoch = at.epoch + 1
        run.lease.open(
            epoch,
            request.client_name,
            request.process,
            request.digest_versions,
            supersedes=bool(at.writer),
        )
        run.queue.refuse_steps(partial(_fenced, Holder(request.client_name, epoch, request.process)))
        run.queue.push_first(Takeover(epoch, request))
        run.work.notify()

    def record(self, takeover: Takeover) -> None:
        """Hand an epoch to the committer, between two steps."""
        run, request, epoch = self._run, takeover.request, takeover.epoch
        failpoints.passing("session.opening")
        with run.mutex:
            superseded = epoch != run.lease.epoch
            here = run.head.computed
            events: Events = ()
            if not superseded:
                versions = {"epoch": epoch, "versions": list(request.digest_versions)}
                events = (*self._keep(request), (DIGEST_VERSIONS, versions))
            if request.takeover and not superseded:
                run.head.non_finite = 0
                run.conditions.set(RunState.HALTED, False)
        # A superseded nonce is used up all the same, or a retry would fence whoever superseded it.
        record = SessionRecord(
            epoch, request.client_name, request.nonce, request.takeover and not superseded,
            here.lineage, here.step, superseded,
        )  # fmt: skip
        process = None if superseded else request.process
        self._committer.append(SessionCommit(record, process, events, self._opened))

    def _keep(self, request: SessionRequest) -> Events:
        """What a client said of its tokenizer, data and evaluations, as events; others were refused."""
        head = self._run.head
        events: list[tuple[str, dict[str, Any]]] = []
        if request.tokenizer not in ("", head.tokenizer):
            head.tokenizer = request.tokenizer
            events.append(("tokenizer", {"tokenizer": request.tokenizer}))
        if request.data not in ({}, head.data):
            head.data = request.data
            events.append(("data", dict(request.data)))
        seen = (head.computed.lineage, request.evaluated_step)
        if request.evaluated_step and seen != head.evaluated:
            head.evaluated = seen
            events.append((EVALUATED, {"lineage": seen[0], "step": seen[1]}))
        return tuple(events)

    def _opened(self, record: SessionRecord) -> None:
        """An epoch is durable: answer whoever opened it."""
        if record.closed:
            self._refuse(
                record.nonce or "",
                Refused("FENCED", f"epoch {record.epoch} was superseded while it was opened"),
            )
            return
        with self._run.mutex:
            if record.epoch == self._run.lease.epoch:
                self._run.lease.opened()
            reply = self._answer(record.epoch)
            futures = self._opening.pop(record.nonce or "")
        for future in futures:
            answer(future, reply)

    def _refuse(self, nonce: str, refusal: Refused) -> None:
        with self._run.mutex:
            futures = self._opening.pop(nonce)
        for future in futures:
            refuse(future, refusal)

    def refuse_all(self, refusal: Refused) -> None:
        """Refuse whoever waits for a session: the process ends."""
        for nonce in list(self._opening):
            self._refuse(nonce, refusal)

    def close(self, session: SessionRef, future: Future[None]) -> None:
        """End the writer's session; a second time is no error."""
        with self._run.mutex:
            at = self._run.situation()
            if at.closed and (session.run_id, session.epoch) == (at.run_id, at.epoch):
                answer(future, None)
                return
            admission.check_session(session, at)
            self._run.lease.closed = True
            self._committer.append(SessionEnd(future, None, session.epoch))

    def _answer(self, epoch: int) -> SessionAnswer:
        """Its own epoch, whoever has opened another meanwhile: that one fences it."""
        head, lease = self._run.head, self._run.lease
        return SessionAnswer(
            head.computed.run_id,
            head.computed.lineage,
            epoch,
            head.computed.step,
            head.durable.step,
            head.durable.digest,
            head.tokenizer,
            data=head.data,
            superseded=lease.superseded if epoch == lease.epoch else None,
            evaluated_lineage=head.evaluated[0],
            evaluated_step=head.evaluated[1],
            inexact_replays=head.inexact_replays,
            digest_version=self._run.step_version(bare=False).number,
        )


def recorded_process(journal: Journal, session: SessionRecord | None) -> ClientProcess | None:
    """The process of a session's client; None: it was not said."""
    found = journal.last_event(CLIENT_PROCESS)
    if session is None or found is None or found[1]["epoch"] != session.epoch:
        return None
    known = {field.name for field in fields(ClientProcess)}  # a newer version may have kept more
    return ClientProcess(**{name: value for name, value in found[1].items() if name in known})


def recorded_digest_versions(journal: Journal, session: SessionRecord | None) -> tuple[int, ...]:
    """The versions of the digest that a session's client computes; a session of version 0.1 has no record."""
    found = journal.last_event(DIGEST_VERSIONS)
    recorded = session is not None and found is not None and found[1]["epoch"] == session.epoch
    return tuple(found[1]["versions"]) if recorded and found else (1,)


def recorded_evaluation(journal: Journal) -> tuple[int, int]:
    """Lineage and number of the last step that a writer reported as evaluated; zeros: none."""
    found = journal.last_event(EVALUATED)
    return (found[1]["lineage"], found[1]["step"]) if found else (0, 0)


def _fenced(holder: Holder, step: Step) -> Refused:
    if step.request.session is None:
        return Refused(
            "WRITER_PRESENT", f"{holder} opened a session; wait until it is closed", **holder.metadata()
        )
    return Refused(
        "FENCED", f"{holder} took over with epoch {holder.epoch}; stop this one", **holder.metadata()
    )
