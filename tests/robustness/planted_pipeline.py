"""R9's faults between admission, device and journal: what catches them, and how each is planted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from rig import wait_for
from robustness import damage

from maskwire_server import failpoints
from maskwire_server.engine import commits, committer, queue, save_thread
from maskwire_server.journal import database, journal
from maskwire_server.requests import EvalRequest, SaveRequest, StepRequest
from maskwire_server.results import EvalOptions

Patch = tuple[Any, str, Any]


# What catches them.


@contextlib.contextmanager
def held_journal(folder: Path, place: str = "journal.begin") -> Iterator[tuple[Any, Any]]:
    """Yield an engine whose first step is computed and waits for the journal, and the step's future."""
    with damage.Run(folder / "run") as run:
        reached, release = threading.Event(), threading.Event()

        def hold(name: str) -> None:
            if name == place:
                reached.set()
                assert release.wait(damage.WAIT)

        failpoints.install(hold)
        try:
            step = run.engine.train_step(StepRequest(damage.payload(1), None, None, "first"))
            assert reached.wait(damage.WAIT)
            yield run.engine, step
        finally:
            failpoints.install(None)
            release.set()
        wait_for(lambda: step.done() or bool(run.fatal))
        assert not run.fatal, f"the journal refused it: {run.fatal[0]}"
        assert step.result().step == 1


def an_answer_beside_a_held_journal(folder: Path) -> None:
    """A step is not answered before its transaction is committed, on the thread that commits it."""
    for place in ("journal.begin", "journal.written"):
        with held_journal(folder / place, place) as (engine, step):
            assert not step.done(), f"it was answered at {place}"
            assert engine.status().durable_step == 0


def a_read_beside_a_held_journal(folder: Path) -> None:
    """An evaluation is not answered while the step that it saw is not durable."""
    with held_journal(folder) as (engine, _):
        seen = engine.eval_loss(EvalRequest(damage.payload(2).batch, EvalOptions((0,))))
        with contextlib.suppress(TimeoutError):
            seen.result(0.5)
            raise AssertionError("it was answered")


def a_save_beside_a_held_journal(folder: Path) -> None:
    """No checkpoint of a step is published while the step is not durable."""
    with held_journal(folder) as (engine, _):
        saved = engine.save(SaveRequest("ahead"))
        with contextlib.suppress(TimeoutError):
            saved.result(0.5)
            raise AssertionError("it was answered")
        assert not (folder / "run" / "checkpoints" / "ahead").exists(), "it was published"


def a_retry_beside_the_device(folder: Path) -> None:
    """The same request joins the one that is being computed, and is not trained once more."""
    with damage.Run(folder / "run") as run:
        run.trainer.gate.clear()
        try:
            step = run.engine.train_step(StepRequest(damage.payload(1), None, None, "first"))
            assert run.trainer.entered.acquire(timeout=damage.WAIT)
            retry = run.engine.train_step(StepRequest(damage.payload(1), None, None, "first"))
        finally:
            run.trainer.gate.set()
        answers = [step.result(damage.WAIT).step, retry.result(damage.WAIT).step]
        assert run.trainer.trained == [(1, 1)], "it was trained twice"
        assert answers == [1, 1]
        assert run.engine.status().durable_step == 1


def steps_one_after_another(folder: Path) -> None:
    """Each step has the number after that of the step before it."""
    with damage.Run(folder / "run") as run:
        for step in range(1, 6):
            future = run.engine.train_step(StepRequest(damage.payload(step)))
            wait_for(lambda: future.done() or bool(run.fatal))  # noqa: B023
            assert not run.fatal, f"the journal refused step {step}: {run.fatal[0]}"
            assert future.result().step == step, "a number is left out"


class Transactions:
    """Which thread opened each transaction of a journal, and which wrote each step within its own."""

    def __init__(self) -> None:
        self.openers: list[int] = []
        self.writers: dict[int, int] = {}
        self.outside: list[int] = []
        """Steps that a thread wrote while it had no transaction open."""
        self.another = threading.Event()
        """Set when a second thread opens a transaction."""
        self._at_work = threading.local()
        self._connection = threading.Lock()

    @contextlib.contextmanager
    def recorded(self, release: Callable[[], object]) -> Iterator[None]:
        """Record transactions and writes. The first transaction begins when `release` returns."""
        transaction, add_step = database.Database.transaction, journal.Journal.add_step

        def opened(opener: Any, write: Callable[[], object]) -> None:
            thread = threading.get_ident()
            self.openers.append(thread)
            if thread != self.openers[0]:
                self.another.set()
            if len(self.openers) == 1:
                release()
            with self._connection:  # two threads in it at once can crash the process
                self._at_work.open = True
                try:
                    transaction(opener, write)
                finally:
                    self._at_work.open = False

        def added(writer: Any, record: Any, payload: bytes) -> None:
            if not getattr(self._at_work, "open", False):
                self.outside.append(record.step)
            self.writers[record.step] = threading.get_ident()
            add_step(writer, record, payload)

        with (
            mock.patch.object(database.Database, "transaction", opened),
            mock.patch.object(journal.Journal, "add_step", added),
        ):
            yield


def steps_from_many_threads(folder: Path) -> None:
    """One thread opens every transaction, and each step is written in one of them."""
    found, steps = Transactions(), range(1, 60)
    with damage.Run(folder / "run") as run, ThreadPoolExecutor(4) as clients:

        def send(step: int) -> Any:
            return run.engine.train_step(StepRequest(damage.payload(step)))

        def release() -> None:
            """Hold the first step's transaction until others are computed: a second thread would open one."""
            wait_for(lambda: len(run.trainer.trained) >= 3)
            found.another.wait(1)

        with found.recorded(release):
            futures = [send(1)]
            wait_for(lambda: bool(found.openers))
            futures += clients.map(send, steps[1:])
            wait_for(lambda: all(future.done() for future in futures) or bool(run.fatal))
        assert len(set(found.openers)) == 1, "two threads open transactions"
        assert not run.fatal, f"the journal refused a step: {run.fatal[0]}"
        assert sorted(future.result().step for future in futures) == list(steps)
        assert not found.outside, "steps are written outside of transactions"
        assert found.writers == dict.fromkeys(steps, found.openers[0])


# What is taken out.


def _answer_before_the_journal() -> list[Patch]:
    written = committer.Committer._write_all

    def write_late(self: Any, taken: list[Any]) -> bool:
        for commit in taken:
            commit.committed()
            commit.committed = lambda: None
        return written(self, taken)

    return [(committer.Committer, "_write_all", write_late)]


def _read_before_the_flush() -> list[Patch]:
    def at_once(self: Any, commit: Any) -> None:
        if isinstance(commit, commits.AnswerCommit):
            commit.committed()
        else:
            appended(self, commit)

    appended = committer.Committer.append
    return [(committer.Committer, "append", at_once)]


def _checkpoint_before_the_flush() -> list[Patch]:
    appended = committer.Committer.append

    def at_once(self: Any, commit: Any) -> None:
        if isinstance(commit, save_thread.SaveCommit):
            commit.committed()
            commit.committed = lambda: None  # type: ignore[method-assign]
        appended(self, commit)

    return [(committer.Committer, "append", at_once)]


def _id_forgotten_before_its_commit() -> list[Patch]:
    started = queue.Queue.start

    def forgetful(self: Any, step: Any, number: int) -> None:
        started(self, step, number)
        self._by_id.pop(step.request.request_id, None)

    return [(queue.Queue, "start", forgetful)]


def _a_missed_number() -> list[Patch]:
    started = queue.Queue.start

    def skipping(self: Any, step: Any, number: int) -> None:
        started(self, step, number + (number == 3))

    return [(queue.Queue, "start", skipping)]


def _two_committers() -> list[Patch]:
    start, close = committer.Committer.start, committer.Committer.close
    second: list[threading.Thread] = []

    def twice(self: Any) -> None:
        start(self)
        second.append(threading.Thread(target=self._main, daemon=True))
        second[-1].start()

    def both(self: Any) -> None:  # a connection that is closed while a thread uses it ends the process
        self._stopping = True
        for thread in (self._thread, *second):
            while thread.is_alive():
                self.wake()
                thread.join(0.01)
        close(self)

    return [(committer.Committer, "start", twice), (committer.Committer, "close", both)]


BUGS = {
    "answer-before-the-journal": ("answers go out before their step is durable",
        _answer_before_the_journal, an_answer_beside_a_held_journal,
    ),
    "read-before-the-flush": ("an evaluation tells of a step that is not durable",
        _read_before_the_flush, a_read_beside_a_held_journal,
    ),
    "checkpoint-before-the-flush": ("a checkpoint is ahead of the journal",
        _checkpoint_before_the_flush, a_save_beside_a_held_journal,
    ),
    "id-forgotten-before-its-commit": ("a retry beside the commit is a new step",
        _id_forgotten_before_its_commit, a_retry_beside_the_device,
    ),
    "missed-number": ("a number is left out", _a_missed_number, steps_one_after_another),
    "two-committers": ("two threads use the journal", _two_committers, steps_from_many_threads),
}  # fmt: skip
