"""OpenSession and CloseSession: one writer at a time, and a durable epoch for each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, fields
from functools import partial

from maskwire_server import failpoints
from maskwire_server.engine import admission
from maskwire_server.engine.admission import Position, SessionFacts
from maskwire_server.engine.committer import Commits
from maskwire_server.engine.entries import Barrier, Step
from maskwire_server.engine.executor import Device
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.lease import Writer
from maskwire_server.engine.state import Head, Standing
from maskwire_server.engine.step_queue import Line
from maskwire_server.errors import Refused, invalid_field
from maskwire_server.holder import ClientProcess, Holder
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import SessionRecord
from maskwire_server.recovery.replay import digest_at
from maskwire_server.requests import SessionRef, SessionRequest
from maskwire_server.results import RunState, SessionAnswer

CLIENT_PROCESS = "client_process"
"""The kind of event that keeps the process of a session's client."""
EVALUATED = "evaluated"
"""The kind of event that keeps which step a writer has evaluated."""


class Sessions:
    """Only the engine's thread calls it."""

    def __init__(
        self,
        journal: Journal,
        commits: Commits,
        line: Line,
        writer: Writer,
        head: Head,
        standing: Standing,
        device: Device,
    ) -> None:
        self._device = device
        self._opening: dict[str, list[Future[SessionAnswer]]] = {}  # by nonce, until durable
        self._journal = journal
        self._commits = commits
        self._line = line
        self._writer = writer
        self._head = head
        self._standing = standing

    def open(self, request: SessionRequest, at: Position, future: Future[SessionAnswer]) -> None:
        """Admit a writer: fence the one before at once, answer once the running step is durable."""
        if request.nonce in self._opening:  # the same call once more
            self._opening[request.nonce].append(future)
            return
        given = self._journal.session_of_nonce(request.nonce)
        recorded = None
        if request.history is not None:
            recorded = digest_at(self._journal, self._head.lineage, request.history.step)
        epoch = given.epoch if given else None
        # What was said before anything was trained can still be corrected.
        tokenizer = self._head.tokenizer if self._line.next_step > 1 else ""
        data = self._head.data if self._line.next_step > 1 else {}
        facts = SessionFacts(request, epoch, self._head.durable[0], recorded, tokenizer, data)
        new = admission.admit_session(facts, at)
        if request.evaluated_step > self._head.durable[0]:
            raise invalid_field(
                "evaluated_step",
                f"evaluated_step must be at most the durable step {self._head.durable[0]}, got "
                f"{request.evaluated_step}",
            )
        if not new:
            self._writer.touch()
            here = at.epoch
            self._commits.add(self._keep_data(request), lambda: None)
            self._commits.add(self._keep_evaluation(request), lambda: None)
            self._commits.add(self._keep_tokenizer(request), lambda: answer(future, self._answer(here)))
            return
        epoch = at.epoch + 1
        self._opening[request.nonce] = [future]
        keep = self._keep_tokenizer(request)
        self._writer.open(epoch, request.client_name, request.process, supersedes=bool(at.writer))
        self._line.refuse_steps(partial(_fenced, Holder(request.client_name, epoch, request.process)))
        self._line.put_first(
            Barrier(partial(self._record, epoch, request, keep), partial(self._refuse_opening, request.nonce))
        )

    def _keep_tokenizer(self, request: SessionRequest) -> Callable[[], object]:
        """The write that keeps what a client's ids stand for; another one was refused before."""
        if request.tokenizer in ("", self._head.tokenizer):
            return lambda: None
        self._head.tokenizer = request.tokenizer
        return partial(self._journal.add_event, "tokenizer", {"tokenizer": request.tokenizer})

    def _keep_data(self, request: SessionRequest) -> Callable[[], object]:
        """The write that keeps the fingerprint of a client's data; another one was refused before."""
        if request.data in ({}, self._head.data):
            return lambda: None
        self._head.data = request.data
        return partial(self._journal.add_event, "data", dict(request.data))

    def _keep_evaluation(self, request: SessionRequest) -> Callable[[], object]:
        """The write that keeps which step was evaluated."""
        seen = (self._head.lineage, request.evaluated_step)
        if not request.evaluated_step or seen == self._head.evaluated:
            return lambda: None
        self._head.evaluated = seen
        return partial(self._journal.add_event, EVALUATED, {"lineage": seen[0], "step": seen[1]})

    def _record(
        self,
        epoch: int,
        request: SessionRequest,
        keep_tokenizer: Callable[[], object],
    ) -> None:
        if epoch != self._writer.epoch:
            # Its nonce is used up all the same, or a retry would fence whoever superseded it.
            head = self._head
            late = SessionRecord(
                epoch, request.client_name, request.nonce, False, head.lineage, head.step, True
            )
            superseded = Refused("FENCED", f"epoch {epoch} was superseded while it was opened")
            self._commits.add(keep_tokenizer, lambda: None)
            self._commits.add(
                partial(self._journal.add_session, late),
                partial(self._refuse_opening, request.nonce, superseded),
            )
            return
        failpoints.passing("session.opening")
        head = self._head
        session = SessionRecord(
            epoch, request.client_name, request.nonce, request.takeover, head.lineage, head.step, False
        )
        if request.takeover:
            head.non_finite = self._device.non_finite = 0
            self._standing.set(RunState.HALTED, False)
        self._commits.add(keep_tokenizer, lambda: None)
        self._commits.add(self._keep_data(request), lambda: None)
        self._commits.add(self._keep_evaluation(request), lambda: None)
        self._commits.add(
            partial(self._add_session, session, request.process), partial(self._opened, request.nonce, epoch)
        )

    def _add_session(self, session: SessionRecord, process: ClientProcess | None) -> None:
        self._journal.add_session(session)
        if process is not None:
            self._journal.add_event(CLIENT_PROCESS, {"epoch": session.epoch, **asdict(process)})

    def _opened(self, nonce: str, epoch: int) -> None:
        failpoints.passing("session.opened")
        if epoch == self._writer.epoch:
            self._writer.opened()
        for future in self._opening.pop(nonce):
            answer(future, self._answer(epoch))

    def _refuse_opening(self, nonce: str, refusal: Refused) -> None:
        for future in self._opening.pop(nonce):
            refuse(future, refusal)

    def close(self, session: SessionRef, at: Position, future: Future[None]) -> None:
        """End the writer's session; once more is no error."""
        if at.closed and (session.run_id, session.epoch) == (at.run_id, at.epoch):
            answer(future, None)
            return
        admission.check_session(session, at)
        self._writer.closed = True
        self._commits.add(partial(self._journal.close_session, session.epoch), partial(answer, future, None))

    def _answer(self, epoch: int) -> SessionAnswer:
        """Its own epoch, whoever has opened another meanwhile: that one fences it."""
        head = self._head
        durable_step, digest = head.durable
        return SessionAnswer(
            head.run_id,
            head.lineage,
            epoch,
            head.step,
            durable_step,
            digest,
            head.tokenizer,
            data=head.data,
            superseded=self._writer.superseded if epoch == self._writer.epoch else None,
            evaluated_lineage=head.evaluated[0],
            evaluated_step=head.evaluated[1],
            inexact_replays=head.inexact_replays,
        )


def recorded_process(journal: Journal, session: SessionRecord | None) -> ClientProcess | None:
    """The process of a session's client; None: it was not said."""
    found = journal.last_event(CLIENT_PROCESS)
    if session is None or found is None or found[1]["epoch"] != session.epoch:
        return None
    known = {field.name for field in fields(ClientProcess)}  # a newer version may have kept more
    return ClientProcess(**{name: value for name, value in found[1].items() if name in known})


def recorded_evaluation(journal: Journal) -> tuple[int, int]:
    """Lineage and number of the last step that a writer said it had evaluated; zeros: none."""
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
