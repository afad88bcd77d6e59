"""The calls OpenSession and CloseSession: one writer at a time, each with a durable epoch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from maskwire.v1.values import RunState
from maskwire_server import failpoints
from maskwire_server.engine import admission_rules
from maskwire_server.engine.admission_rules import Situation
from maskwire_server.engine.commits import AnswerCommit, Events, SessionEnd
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import SessionOpening, Step
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.session_rules import SessionFacts, admit_session
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused, invalid_field
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import SessionRecord
from maskwire_server.requests import SessionRef, SessionRequest
from maskwire_server.results import SessionAnswer
from maskwire_server.session_holder import ClientProcess

CLIENT_PROCESS = "client_process"
"""The kind of event that records the process of a session's client."""
EVALUATED = "evaluated"
"""The kind of event that records which step a writer has evaluated."""
DIGEST_VERSIONS = "digest_versions"
"""The kind of event that records which digest versions a session's client supports."""


@dataclass(eq=False)
class SessionCommit:
    """Records a new epoch, the process of its client, and the facts that its request changed."""

    record: SessionRecord
    process: ClientProcess | None
    events: Events
    sessions: Sessions

    def write(self, journal: Journal) -> None:
        """Record the session, the events and the client's process."""
        for kind, body in self.events:
            journal.add_event(kind, body)
        journal.add_session(self.record)
        if self.process is not None:
            journal.add_event(CLIENT_PROCESS, {"epoch": self.record.epoch, **asdict(self.process)})

    def committed(self) -> None:
        """Answer the callers that opened the session."""
        failpoints.passing("session.opened")
        self.sessions.opened(self.record)


class Sessions:
    """Opens and closes the sessions of writers.

    `open` and `close` run on gRPC's threads, `record` on the executor's, and `opened` on the committer's.
    """

    def __init__(self, run: Run, committer: Committer, *, pretrained: bool) -> None:
        """`pretrained` says whether the model started from pretrained weights."""
        self._run = run
        self._committer = committer
        self._pretrained = pretrained
        self._opening: dict[str, list[Future[SessionAnswer]]] = {}  # by nonce, until durable

    def open(self, request: SessionRequest, future: Future[SessionAnswer]) -> None:
        """Make the caller the writer. The previous writer is fenced at once.

        `future` is answered once the new epoch is durable.
        """
        run = self._run
        with run.mutex:
            if request.nonce in self._opening:  # a retry of the same call
                self._opening[request.nonce].append(future)
                return
            self._opening[request.nonce] = [future]
        history, digest = request.history, None
        try:
            given = self._committer.read(Journal.session_of_nonce, request.nonce)
            if history is not None:
                digest = self._committer.read(Journal.digest_at, run.head.computed.lineage, history.step)
            with run.mutex:
                self._admit(request, given.epoch if given else None, digest)
        except Refused as refusal:
            self._refuse(request.nonce, refusal)

    def _admit(self, request: SessionRequest, nonce_epoch: int | None, digest: bytes | None) -> None:
        """Open a new epoch and queue its record, or answer with the epoch that the nonce already has.

        Called under the mutex. Raises Refused.
        """
        run, at = self._run, self._run.situation()
        durable = run.head.durable.step
        # Tokenizer and data can be corrected until the first step.
        trained = run.next_number > 1
        facts = SessionFacts(
            request,
            nonce_epoch,
            durable,
            digest,
            run.head.tokenizer if trained else "",
            self._pretrained,
            run.head.data if trained else {},
        )
        new = admit_session(facts, at)
        if request.evaluated_step > durable:
            raise invalid_field(
                "evaluated_step",
                f"evaluated_step must be at most the durable step {durable}, got {request.evaluated_step}",
            )
        if not new:
            run.lease.touch()
            events = self._keep(request)
            futures = self._opening.pop(request.nonce, [])
            reply = self._answer(at.epoch)
            for future in futures:  # empty if a drain has refused them
                self._committer.append(AnswerCommit(future, reply, events=events))
                events = ()
            return
        epoch = at.epoch + 1
        run.lease.open(
            epoch,
            request.client_name,
            request.process,
            request.digest_versions,
            supersedes=bool(at.writer),
        )
        run.queue.refuse_steps(partial(_superseded, at=run.situation()))
        run.queue.push_ahead(SessionOpening(epoch, request))
        run.work.set()

    def record(self, takeover: SessionOpening) -> None:
        """Hand the record of a new epoch to the committer, between two steps, on the executor's thread."""
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
        # A superseded nonce is recorded too, or its retry would fence the client that superseded it.
        record = SessionRecord(
            epoch, request.client_name, request.nonce, request.takeover and not superseded,
            here.lineage, here.step, superseded,
        )  # fmt: skip
        process = None if superseded else request.process
        self._committer.append(SessionCommit(record, process, events, self))

    def _keep(self, request: SessionRequest) -> Events:
        """Keep the request's tokenizer, data and evaluated step. Returns an event for each that changed."""
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

    def opened(self, record: SessionRecord) -> None:
        """Answer the callers that opened an epoch, which is now durable. Runs on the committer's thread.

        If the epoch was superseded meanwhile, they are refused.
        """
        if record.closed:
            self._refuse(
                record.nonce or "",
                Refused(
                    "FENCED",
                    f"epoch {record.epoch} was superseded while its session was being opened; stop this "
                    "client",
                ),
            )
            return
        with self._run.mutex:
            if record.epoch == self._run.lease.epoch:
                self._run.lease.opened()
            reply = self._answer(record.epoch)
            futures = self._opening.pop(record.nonce or "", [])  # empty if a drain refused them
        for future in futures:
            answer(future, reply)

    def _refuse(self, nonce: str, refusal: Refused) -> None:
        with self._run.mutex:
            futures = self._opening.pop(nonce, [])
        for future in futures:
            refuse(future, refusal)

    def refuse_all(self, refusal: Refused) -> None:
        """Refuse every session that is being opened, because the process is shutting down."""
        for nonce in list(self._opening):
            self._refuse(nonce, refusal)

    def close(self, session: SessionRef, future: Future[None]) -> None:
        """End the writer's session. Closing it again is not an error."""
        with self._run.mutex:
            at = self._run.situation()
            if at.closed and (session.run_id, session.epoch) == (at.run_id, at.epoch):
                # The record of the end may not be durable yet.
                self._committer.append(AnswerCommit(future, None))
                return
            admission_rules.check_session(session, at)
            self._run.lease.closed = True
            self._committer.append(SessionEnd(future, None, session.epoch))

    def _answer(self, epoch: int) -> SessionAnswer:
        """The answer to the caller that opened `epoch`, even if a newer epoch has superseded it."""
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
    """The process of a session's client; None if it is not recorded."""
    found = journal.last_event(CLIENT_PROCESS)
    if session is None or found is None or found[1]["epoch"] != session.epoch:
        return None
    known = {field.name for field in fields(ClientProcess)}  # a newer version may have recorded more
    return ClientProcess(**{name: value for name, value in found[1].items() if name in known})


def recorded_digest_versions(journal: Journal, session: SessionRecord | None) -> tuple[int, ...]:
    """The digest versions that the session's client supports; (1,) for maskwire 0.1, which reports none."""
    found = journal.last_event(DIGEST_VERSIONS)
    recorded = session is not None and found is not None and found[1]["epoch"] == session.epoch
    return tuple(found[1]["versions"]) if recorded and found else (1,)


def recorded_evaluation(journal: Journal) -> tuple[int, int]:
    """Lineage and number of the newest step that a writer reported as evaluated; (0, 0) if none."""
    found = journal.last_event(EVALUATED)
    return (found[1]["lineage"], found[1]["step"]) if found else (0, 0)


def _superseded(step: Step, at: Situation) -> Refused:
    session = step.request.session
    if session is None:
        return admission_rules.writer_present(at, "wait until that session is closed or idle")
    return admission_rules.fenced(session.epoch, at)
