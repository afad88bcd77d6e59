"""Engine, admission and journal against a model that only counts.

Hypothesis drives sessions, steps, retries, restores, full disks, crashes and the clock in any order; after
each operation the answer must be the one that the model gives, and so must what the run holds. A crash
leaves what was on the disk at one instant, with steps in flight: the run directory is copied there, between
two moves of the engine, and the run goes on from the copy.

MASKWIRE_MODEL_RUNS and MASKWIRE_MODEL_STEPS set how many runs of how many operations; `make test` takes a
sample, `make model` 10,000 runs of 50.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from counter import NAN_ID
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rig import DIGEST, WAIT, FullDisk, make_engine, wait_for

from maskwire.v1.digest import lineage_digest, step_digest
from maskwire_server import config, failpoints
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.engine.committer import RETRY_SECONDS
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import (
    RestoreRequest,
    SaveRequest,
    SessionRef,
    SessionRequest,
    StepRequest,
)
from maskwire_server.step_listing import StepsRequest

PLACES = (  # where the run directory is copied; nothing but the journal's log grows meanwhile
    "step.admitted",
    "step.consumed",
    "journal.begin",
    "journal.written",
    "journal.committed",
    "step.durable",
    "step.answered",
)
RUNS = int(os.environ.get("MASKWIRE_MODEL_RUNS", "40"))
OPERATIONS = int(os.environ.get("MASKWIRE_MODEL_STEPS", "30"))
WINDOW, IDLE, GAP = 4, 60.0, 5.0
CONFIG = config.load(
    None,
    serve={
        "window": WINDOW,
        "session_idle_seconds": IDLE,
        "gap_seconds": GAP,
        "durability": "off",
        "reserve_bytes": 0,
    },
    checkpoints={"every_seconds": 1e9, "keep_last": 2},
)
ROOM = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk that forgets nothing and flushes at once


def payload(number: int, finite: bool = True) -> Payload:
    ids = np.random.default_rng(number).integers(10, 200, (1, 4))
    if not finite:
        ids[0, 0] = NAN_ID
    return Payload(Batch(ids, 1, 4), Modes())


@dataclass(frozen=True)
class Ahead:
    """A step that waits for its turn."""

    future: Future[Any]
    request_id: str | None
    sent: Payload
    since: float
    bare: bool


class WriterModel(RuleBasedStateMachine):
    """The model is the attributes; `engine` is what it is held against."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=ROOM))
        self.now = 0.0
        self.fatal: list[BaseException] = []
        self.engine: Engine
        self.start()
        status = self.engine.status()
        self.run_id = status.run_id
        self.lineage, self.step, self.digest = 1, 0, status.digest
        self.at = {(1, 0): status.digest}  # what the run held: (lineage, step) -> digest
        self.known: dict[str, tuple[int, bytes]] = {}  # request id -> step, payload hash
        self.parents: dict[int, tuple[int, int]] = {}  # lineage -> the one and the step it began from
        self.of: dict[str, int] = {}  # request id -> lineage
        self.id_at: dict[tuple[int, int], str | None] = {}  # a computed step -> its request id
        self.remembered: dict[str, int] = {}  # the ids of this process's steps -> step
        self.perhaps_remembered: set[str] = set()  # timing decides whether their steps are this process's
        self.epoch, self.writer, self.closed, self.active = 0, "", True, 0.0
        self.ended_at = -1.0  # when the session was idle for too long; steps that wait do not renew it
        self.nonces: dict[str, int] = {}
        self.sessions: list[SessionRef] = []
        self.non_finite = 0
        self.saved: dict[str, tuple[int, int, bytes]] = {}
        self.ahead: dict[int, Ahead] = {}
        self.refused: set[int] = set()  # steps of which nothing is known but that their senders were refused
        self.made = 0

    def start(self) -> None:
        self.engine = make_engine(
            self.folder / "run", CONFIG, on_fatal=self.fatal.append, clock=lambda: self.now
        )
        try:
            self.engine.wait_serving(WAIT)
        except TimeoutError:
            stacks = ("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())
            raise AssertionError(f"not serving after {WAIT} s:\n" + "\n".join(stacks)) from None

    def teardown(self) -> None:
        failpoints.install(None)
        if hasattr(self, "engine"):
            self.engine.close()
            shutil.rmtree(self.folder)

    def quiet(self) -> None:
        """Wait until the engine has seen everything so far, at the time that it is now."""
        self.engine.list_steps(StepsRequest(1)).result(WAIT)

    # What the model knows.

    @property
    def halted(self) -> bool:
        return self.non_finite >= 3

    def present(self) -> str:
        """The writer whose session is open."""
        if self.closed or not self.epoch:
            return ""
        if not self.ahead and self.now - self.active >= IDLE:
            self.ended_at = self.now
        return "" if self.ended_at > self.active else self.writer

    def fresh(self) -> int:
        self.made += 1
        return self.made

    def check_session(self, session: SessionRef) -> str:
        if (session.run_id, session.lineage) != (self.run_id, self.lineage):
            return "WRONG_RUN"
        if session.epoch < self.epoch:
            return "FENCED"
        return "UNKNOWN_EPOCH" if session.epoch > self.epoch or self.closed else ""

    def in_history(self, lineage: int, step: int) -> bool:
        """Whether the present state descends from a step."""
        at, through = self.lineage, self.step
        while at != lineage and at in self.parents:
            at, through = self.parents[at]
        return at == lineage and step <= through

    def consume(self, request_id: str | None, sent: Payload) -> int:
        """One more step."""
        self.step += 1
        self.refused.discard(self.step)
        finite = sent.batch.ids[0, 0] != NAN_ID
        self.non_finite = 0 if finite else self.non_finite + 1
        self.digest = step_digest(self.digest, self.lineage, self.step, sent.hash(DIGEST), 1 if finite else 2)
        self.at[self.lineage, self.step] = self.digest
        self.id_at[self.lineage, self.step] = request_id
        if request_id is not None:
            self.known[request_id] = self.step, sent.hash(DIGEST)
            self.of[request_id] = self.lineage
            self.remembered[request_id] = self.step
        return self.step

    def fill(self) -> None:
        """What waited for its turn has it."""
        while self.step + 1 in self.ahead and not self.halted:
            waited = self.ahead.pop(self.step + 1)
            self.consume(waited.request_id, waited.sent)
            answer = waited.future.result(WAIT)
            assert (answer.step, answer.digest) == (self.step, self.digest)
            if not waited.bare:
                self.active = self.now
        if self.halted:
            self.drop("HALTED")

    def drop(self, reason: str, bare: str = "") -> None:
        """What waited is refused; a bare call may have a reason of its own."""
        for waited in self.ahead.values():
            assert self.reason(waited.future) == ((bare or reason) if waited.bare else reason)
        self.ahead.clear()
        self.refused.clear()

    @staticmethod
    def reason(future: Future[Any]) -> str:
        error = future.exception(WAIT)
        if error is None:
            return ""
        assert isinstance(error, Refused), error
        return error.reason

    # Operations.

    @rule(data=st.data(), finite=st.sampled_from([True, True, True, False]))
    def train(self, data: Any, finite: bool) -> None:
        session = data.draw(st.sampled_from([None, *self.sessions[-3:]]))
        number = data.draw(st.sampled_from([None, 0, 0, 0, -1, 1, 2, 3, WINDOW]))
        request_id: str | None = data.draw(st.sampled_from([None, "new", "new", "old"]))
        sent = payload(self.fresh(), finite)
        old = sorted(self.known.keys() - self.perhaps_remembered)  # the same in every run of these draws
        if request_id == "old" and old:
            request_id = data.draw(st.sampled_from(old))
        elif request_id is not None:
            request_id = f"r{self.fresh()}"
        step = None if number is None else max(1, self.step + 1 + number)
        expected, ran = self.expect_step(session, step, request_id, sent)
        future = self.engine.train_step(StepRequest(sent, session, step, request_id))
        if expected == "WAIT":
            assert step is not None
            self.refused.discard(step)
            self.ahead[step] = Ahead(future, request_id, sent, self.now, session is None)
            self.quiet()
            if session is not None:
                self.active = self.now
            return
        assert self.reason(future) == expected
        if expected == "PAYLOAD_MISMATCH" and session is not None and step is not None:
            self.refuse(session, step)  # its sender leaves the number to another step
        if expected == "" and ran:
            self.consume(request_id, sent)
            answer = future.result(WAIT)
            assert (answer.step, answer.digest, answer.replayed) == (self.step, self.digest, False)
            if session is not None:
                self.active = self.now
            self.fill()

    def expect_step(
        self, session: SessionRef | None, step: int | None, request_id: str | None, sent: Payload
    ) -> tuple[str, bool]:
        """The reason of the refusal, or "" and whether the step runs; WAIT for one ahead of its turn."""
        if session is not None:
            problem = self.check_session(session)
            if problem:
                return problem, False
        elif self.present():
            return "WRITER_PRESENT", False
        # Every payload is a new one. A session that names its step is known by that, and by the ids that are
        # remembered since the start.
        if request_id in self.remembered and step not in (None, self.remembered[request_id]):
            return "PAYLOAD_MISMATCH", False
        on_their_way = {waited.request_id for waited in self.ahead.values()}
        named = session is not None and step is not None
        if request_id is not None and request_id in on_their_way:
            return "PAYLOAD_MISMATCH", False
        if request_id in self.known and not named:
            return "PAYLOAD_MISMATCH", False
        if step is not None and (step <= self.step or step in self.ahead):
            holder = self.lineage
            while (holder, step) not in self.id_at and holder in self.parents:
                holder = self.parents[holder][0]
            same = request_id is not None and self.id_at.get((holder, step)) == request_id
            return ("PAYLOAD_MISMATCH" if same else "STEP_TAKEN"), False
        distance = 0 if step is None else step - self.step - 1
        if distance >= WINDOW or (step is not None and min(self.refused, default=step) < step):
            return "GAP", False
        if self.halted:
            return "HALTED", False
        return ("WAIT", False) if distance else ("", True)

    @rule(data=st.data(), number=st.integers(-1, WINDOW))
    @precondition(lambda self: self.sessions)
    def refused_before_it_came(self, data: Any, number: int) -> None:
        """Later steps are refused at once, and until another step takes the number."""
        session = data.draw(st.sampled_from(self.sessions[-2:]))
        step = max(1, self.step + 1 + number)
        self.engine.step_refused(session, step)
        self.refuse(session, step)

    def refuse(self, session: SessionRef, step: int) -> None:
        """A step of this number was refused before it was admitted."""
        if self.check_session(session) or not self.step < step <= self.step + WINDOW or step in self.ahead:
            return
        self.refused.add(step)
        for behind in sorted(other for other in self.ahead if other > step):
            assert self.reason(self.ahead.pop(behind).future) == "GAP"

    @rule()
    @precondition(lambda self: not self.ahead and not self.halted)
    def three_steps_that_are_not_finite(self) -> None:
        """They halt the run."""
        session = self.sessions[-1] if self.sessions and not self.check_session(self.sessions[-1]) else None
        if session is None and self.present():
            return
        while not self.halted:
            sent = payload(self.fresh(), finite=False)
            answer = self.engine.train_step(StepRequest(sent, session)).result(WAIT)
            self.consume(None, sent)
            assert (answer.step, answer.digest) == (self.step, self.digest)
        if session is not None:
            self.active = self.now
        self.fill()  # nothing waits, and what was refused before it came is forgotten

    @rule(data=st.data())
    @precondition(lambda self: self.known)
    def retry(self, data: Any) -> None:
        """The same request once more: the recorded answer, whoever asks within the rules."""
        request_id = data.draw(st.sampled_from(sorted(self.known)))
        step, sent_hash = self.known[request_id]
        sent = next(payload(n, f) for n in range(1, self.made + 1) for f in (True, False)
                     if payload(n, f).hash(DIGEST) == sent_hash)  # fmt: skip
        session = data.draw(st.sampled_from([None, *self.sessions[-2:]]))
        problem = self.check_session(session) if session else "WRITER_PRESENT" * bool(self.present())
        if not problem and request_id in {waited.request_id for waited in self.ahead.values()}:
            problem = "PAYLOAD_MISMATCH"  # a session sent another batch with this id and its step
        problem = problem or "WRONG_RUN" * (not self.in_history(self.of[request_id], step))
        future = self.engine.train_step(StepRequest(sent, session, None, request_id))
        assert self.reason(future) == problem
        if not problem:
            answer = future.result(WAIT)
            assert answer.replayed
            assert answer.step == step
            if session is not None:
                self.active = self.now

    @rule(name=st.sampled_from(["a", "b"]), takeover=st.booleans(), data=st.data())
    def open_session(self, name: str, takeover: bool, data: Any) -> None:
        nonce = data.draw(st.sampled_from(["new", "new", *sorted(self.nonces)[-2:]]))
        if nonce == "new":
            nonce = f"n{self.fresh()}"
        held = data.draw(st.sampled_from([None, None, self.epoch or None]))
        history = data.draw(st.sampled_from([None, "true", "lost", "other"]))
        step = data.draw(st.sampled_from([s for lineage, s in self.at if lineage == self.lineage]))
        claimed = {
            None: None,
            "true": HistoryPosition(self.run_id, self.lineage, step, self.at[self.lineage, step]),
            "lost": HistoryPosition(self.run_id, self.lineage, self.step + 1, bytes(32)),
            "other": HistoryPosition(self.run_id, self.lineage, self.step, bytes(32)),
        }[history]
        given = self.nonces.get(nonce)
        if history in ("lost", "other"):
            expected = "HISTORY_LOST"
        elif given is not None and given < self.epoch:
            expected = "FENCED"
        elif given is not None and self.closed:
            expected = "UNKNOWN_EPOCH"
        elif given is None and self.present() not in ("", name) and not takeover:
            expected = "WRITER_PRESENT"
        else:
            expected = ""
        future = self.engine.open_session(SessionRequest(name, nonce, takeover, held, claimed))
        assert self.reason(future) == expected
        if expected:
            return
        answer = future.result(WAIT)
        assert (answer.step, answer.durable_step, answer.digest) == (self.step, self.step, self.digest)
        if given is None:
            self.drop("FENCED", bare="WRITER_PRESENT")
            self.epoch += 1
            self.writer, self.closed = name, False
            self.nonces[nonce] = self.epoch
            if takeover:
                self.non_finite = 0
        assert answer.epoch == self.epoch
        self.active = self.now
        self.sessions.append(SessionRef(self.run_id, self.lineage, self.epoch))

    @rule(data=st.data())
    @precondition(lambda self: self.sessions)
    def close_session(self, data: Any) -> None:
        session = data.draw(st.sampled_from(self.sessions[-2:]))
        same = session.epoch == self.epoch and session.lineage == self.lineage
        expected = "" if self.closed and session.epoch == self.epoch else self.check_session(session)
        assert self.reason(self.engine.close_session(session)) == expected
        if not expected and same:
            self.closed = True

    @rule()
    def save(self) -> None:
        name = f"s{self.fresh()}"
        info = self.engine.save(SaveRequest(name)).result(WAIT)
        assert (info.step, info.digest) == (self.step, self.digest)
        self.saved[name] = self.lineage, self.step, self.digest

    @rule(data=st.data())
    @precondition(lambda self: self.saved)
    def restore(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.saved)))
        answer = self.engine.restore(RestoreRequest(name)).result(WAIT)
        self.drop("WRONG_RUN")
        began, self.step, digest = self.saved[name]
        self.lineage += 1
        self.parents[self.lineage] = began, self.step
        self.digest = self.at[self.lineage, self.step] = lineage_digest(digest, self.lineage)
        self.epoch += 1
        self.closed, self.non_finite = True, 0
        assert (answer.lineage, answer.step, answer.digest) == (self.lineage, self.step, self.digest)
        name = f"step-{self.step:09d}-lineage-{self.lineage}"  # a restore saves at once
        wait_for(lambda: any(info.name == name for info in self.engine.checkpoints()))
        wait_for(lambda: not self.engine._saves.busy)

    @rule()
    def crash(self) -> None:
        """What was in memory is gone, what was answered is not."""
        self.engine.close()
        self.drop("DRAINING")
        self.remembered.clear()
        self.perhaps_remembered.clear()
        self.start()
        self.active = self.now

    @rule(place=st.sampled_from(PLACES), number=st.integers(1, 4), count=st.integers(1, 3))
    @precondition(lambda self: not self.ahead and not self.halted)
    def crash_with_steps_in_flight(self, place: str, number: int, count: int) -> None:
        """Whatever was answered is there, what is there was sent, in its order."""
        session = self.sessions[-1] if self.sessions and not self.check_session(self.sessions[-1]) else None
        if session is None and self.present():
            return
        names = [f"r{self.fresh()}" for _ in range(count)]
        sent = [payload(self.fresh()) for _ in names]
        copy, answered, left = self.folder / "copy", [], [number]
        futures: list[Future[Any]] = []

        def act(name: str) -> None:
            if name != place:  # of one thread alone
                return
            left[0] -= 1
            if not left[0]:
                answered.extend(future for future in list(futures) if future.done())
                shutil.copytree(self.folder / "run", copy)

        failpoints.install(act)
        for name, one in zip(names, sent, strict=True):
            futures.append(self.engine.train_step(StepRequest(one, session, None, name)))
        for future in futures:
            future.result(WAIT)
        self.quiet()
        failpoints.install(None)
        if not copy.exists():  # that many times it was not passed
            shutil.copytree(self.folder / "run", copy)
            answered = futures
        self.engine.close()
        shutil.rmtree(self.folder / "run")
        copy.rename(self.folder / "run")
        self.start()
        self.refused.clear()  # they were in memory
        there = self.engine.status().durable_step - self.step
        before = self.step
        assert len(answered) <= there <= count
        for position, (name, one) in enumerate(zip(names, sent, strict=True)):
            answer = self.engine.train_step(StepRequest(one, session, None, name)).result(WAIT)
            self.consume(name, one)
            assert (answer.step, answer.digest) == (self.step, self.digest)
            assert answer.replayed == (position < there)
        self.remembered = {name: step for name, step in self.remembered.items() if step > before + there}
        self.perhaps_remembered = set(names)
        self.active = self.now

    @rule()
    @precondition(lambda self: not self.ahead and not self.halted)
    def train_on_a_full_disk(self) -> None:
        """What was computed is held and committed later; nothing else is let in meanwhile."""
        session = self.sessions[-1] if self.sessions and not self.check_session(self.sessions[-1]) else None
        if session is None and self.present():
            return
        self.quiet()  # what a save made needless is dropped after its answer, in a commit of its own
        assert self.engine._committer.wait_durable()
        full = threading.Event()
        full.set()

        def act(name: str) -> None:
            if name == "journal.begin" and full.is_set():
                raise FullDisk("database or disk is full")

        failpoints.install(act)
        name, sent = f"r{self.fresh()}", payload(self.fresh())
        future = self.engine.train_step(StepRequest(sent, session, None, name))
        wait_for(lambda: self.engine.status().state.name == "HELD")
        refused = self.engine.train_step(StepRequest(payload(self.fresh()), session))
        assert self.reason(refused) == "HELD"
        assert not future.done()
        full.clear()
        self.now += RETRY_SECONDS
        self.quiet()
        failpoints.install(None)
        self.consume(name, sent)
        answer = future.result(WAIT)
        assert (answer.step, answer.digest) == (self.step, self.digest)
        if session is not None:
            self.active = self.now

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.quiet()
        self.now += seconds
        self.quiet()  # nothing else wakes it: the clock is ours
        expired = [number for number, item in self.ahead.items() if self.now - item.since >= GAP]
        if expired:  # with the later steps that wait
            for number in sorted(n for n in self.ahead if n >= min(expired)):
                assert self.reason(self.ahead.pop(number).future) == "GAP"

    @invariant()
    def the_run_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "known"):
            return
        assert not self.fatal
        status = self.engine.status()
        self.present()  # as the engine, which looks whether the session has ended
        assert (status.lineage, status.durable_step, status.digest) == (self.lineage, self.step, self.digest)
        assert status.state.name == ("HALTED" if self.halted else "SERVING")


TestWriterModel = WriterModel.TestCase
TestWriterModel.settings = settings(
    max_examples=RUNS,
    stateful_step_count=OPERATIONS,
    deadline=None,
    derandomize=RUNS <= 100,
    suppress_health_check=list(HealthCheck),
)
