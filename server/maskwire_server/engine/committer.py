"""The committer thread: the only user of the journal while the run serves.

It writes all waiting commits in one transaction. Then it acts on them: it answers callers, starts the writing
of checkpoints, and shows results of evaluations and generations. Between transactions it answers queries of
the journal, even while the disk is full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, TypeVarTuple

from maskwire.v1.values import RunState
from maskwire_server.engine import admission_rules
from maskwire_server.engine.futures import answer, refuse
from maskwire_server.engine.journal_queries import JournalQuery
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.step_timeout import LEAST_SECONDS
from maskwire_server.engine.wakeup import Wakeup
from maskwire_server.engine.withheld import Withheld, answer_all
from maskwire_server.events import Committed
from maskwire_server.journal import reserve
from maskwire_server.journal.database import JournalError, is_full
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.reserve import Reserve

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
RETRY_SECONDS = 1.0


class Commit(Protocol):
    """A change to make durable. Commits are written in the order in which they were appended."""

    def write(self, journal: Journal) -> None:
        """Write to the journal within a transaction. Called again if the disk was full."""

    def committed(self) -> None:
        """Act on this commit: it and all earlier ones are durable (if answers wait, also in the mirror)."""


class Committer:
    """Groups commits into transactions, and answers queries of the journal. Safe to use from any thread."""

    def __init__(
        self,
        run: Run,
        journal: Journal,
        disk: Reserve,
        clock: Callable[[], float],
        on_fatal: Callable[[BaseException], None],
        *,
        mirrored: bool = False,
    ) -> None:
        """With `mirrored`, answers wait for the mirror, which reports its progress to `mirrored_through`."""
        self._run, self._journal = run, journal
        self._disk = disk
        self._clock = clock
        self._on_fatal = on_fatal
        self._work = Wakeup()
        self._idle = threading.Condition(run.mutex)
        self._commits: list[Commit] = []
        self._committing = 0  # commits taken from the queue whose callers are not answered yet
        self._queries: list[JournalQuery] = []
        self._withheld: Withheld[Commit] = Withheld(waits=mirrored)
        self.on_written: Callable[[], None] = _nothing
        """Called when a transaction is durable on this machine. It must return quickly."""
        self._retry_at: float | None = None
        self._space_requested = False
        self._failed = False  # the disk was full: the same commits are tried again
        self._merge_after = 0.0  # earliest time to retry merging the log after the disk was full
        self._stopping = self._stopped = False
        self._thread = threading.Thread(target=self._main, name="maskwire-committer", daemon=True)

    def start(self) -> None:
        """Start the thread. From now on, no other thread may use the journal."""
        self._thread.start()

    # For other threads.

    def append(self, commit: Commit) -> None:
        """Queue a commit, and wake the thread."""
        self.enqueue(commit)
        self.wake()

    def enqueue(self, commit: Commit) -> None:
        """Queue a commit. The caller must call `wake` after it has released the run's mutex."""
        with self._run.mutex:
            self._commits.append(commit)

    def read(self, question: Callable[[Journal, *Ts], T], *arguments: *Ts) -> T:
        """Call `question(journal, …)`, which must be quick, between two transactions; return its result.

        Re-raises errors of `question`. Raises Refused with reason HISTORY_LOST if a record is damaged.
        """
        return self.ask(question, *arguments).result()

    def ask(self, question: Callable[[Journal, *Ts], T], *arguments: *Ts) -> Future[T]:
        """Do the same as `read`, but return a future instead of waiting for the result."""
        return self._ask(question, arguments, waits=True)

    def ask_unmirrored(self, question: Callable[[Journal, *Ts], T], *arguments: *Ts) -> Future[T]:
        """Do the same as `ask`, but never wait for the mirror. The mirror itself uses this method."""
        return self._ask(question, arguments, waits=False)

    def _ask(self, question: Callable[..., Any], arguments: tuple[Any, ...], *, waits: bool) -> Future[Any]:
        future: Future[Any] = Future()
        with self._run.mutex:
            if self._stopped:
                raise admission_rules.shutting_down()
            self._queries.append(JournalQuery(question, arguments, future, waits))
        self.wake()
        return future

    @property
    def position(self) -> int:
        """The newest mark of the outbox. All changes up to it are durable on this machine."""
        return self._journal.outbox.position

    @property
    def _held_position(self) -> int:
        """The value of `position` if answers wait for the mirror; otherwise 0."""
        return self.position if self._withheld.waits else 0

    def mirrored_through(self, position: int) -> None:
        """Note that the mirror works, and has all changes up to this mark of the outbox."""
        with self._run.mutex:
            self._withheld.mirrored(position)
            self._withheld.problem = ""
            self._show_held()
        self.wake()

    def mirror_failed(self, problem: str) -> None:
        """Note that the mirror cannot be written. If answers wait for it, enter HELD and refuse them."""
        with self._run.mutex:
            if not self._withheld.waits:
                return
            self._withheld.problem = problem
            self._withheld.refuse_answers()
            self._show_held()
            self._idle.notify_all()
        self.wake()

    def wake(self) -> None:
        """Make the thread look for commits, queries and expired steps."""
        self._work.set()

    def request_space(self) -> None:
        """Ask the thread to merge the journal's log if that frees space, and then to wake the executor."""
        self._space_requested = True
        self.wake()

    def hold(self) -> None:
        """Enter HELD until there is space on the journal's disk. The caller must hold the run's mutex."""
        if not self._run.conditions.holds(RunState.HELD):
            log.error("the journal's disk has no space: free some, and training resumes by itself")
        if self._retry_at is None:  # requests that are refused must not postpone the next try
            self._retry_at = self._clock() + RETRY_SECONDS
        self._show_held()
        self._idle.notify_all()
        self.wake()

    def _show_held(self) -> None:
        """Enter or leave the state HELD, as disk and mirror require. The caller must hold the mutex."""
        waiting_for = "space on the journal's disk" if self._retry_at is not None else self._withheld.problem
        self._run.conditions.set(RunState.HELD, bool(waiting_for), waiting_for=waiting_for)
        self._run.work.set()

    def wait_durable(self) -> bool:
        """Wait until all queued commits are durable; False if disk or mirror fails, or the thread ended."""
        with self._run.mutex:
            while self._commits or self._committing:
                if self._failed or self._stopped or self._withheld.problem:
                    return False
                self._idle.wait()
            return True

    def withdraw(self, commit: Commit) -> bool:
        """Remove a commit that waits for disk space. Return False if it is durable or being written."""
        with self._run.mutex:
            if commit not in self._commits:
                return False
            self._commits.remove(commit)
            self._failed = bool(self._commits)
            return True

    def close(self) -> None:
        """Commit what is queued, unless the disk is full, and end the thread."""
        with self._run.mutex:
            self._stopping = True
        self.wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # The thread.

    def _main(self) -> None:
        try:
            while self._cycle():
                pass
        except BaseException as error:
            log.critical("the journal failed: the server exits; restart it to recover the run", exc_info=True)
            self._on_fatal(error)
        finally:
            with self._run.mutex:
                self._stopped = True
                queries, self._queries = self._queries, []
                self._withheld.refuse_answers()
                self._idle.notify_all()
            self._run.work.set()
            for query in queries:
                refuse(query.future, admission_rules.shutting_down())

    def _cycle(self) -> bool:
        """Do the work that is due, or wait for work. Return False if the thread should end."""
        with self._run.mutex:
            self._run.queue.expire(self._run.next_number)
            queries, self._queries = self._queries, []
            commits: list[Commit] = []
            if self._ready():
                commits, self._commits = self._commits, []
                self._committing += len(commits)
            stopping = self._stopping
            room_due = self._retry_at is not None and self._clock() >= self._retry_at
            requested, self._space_requested = self._space_requested, False
            timeout = self._timeout()
            released = self._withheld.due
        if not (queries or commits or stopping or room_due or requested or released):
            self._work.wait(timeout)
            return True
        self._run.committing.begin("the journal's transaction", LEAST_SECONDS)
        for query in queries:
            self._answer(query)
        if room_due or requested:
            self._free_log_space()
        if requested:
            self._run.work.set()
        written = bool(commits) and self._write_all(commits)
        if room_due and not self._failed:
            self._look_for_space()
        if written:
            self._publish(commits)
        if released:
            self._release()
        due = (
            written
            and self._journal.log_bytes() >= reserve.MERGE_BYTES
            and self._clock() >= self._merge_after
        )
        if due and not reserve.merge_log(self._journal):
            self._merge_after = self._clock() + RETRY_SECONDS
        self._run.committing.end()
        return not stopping or (written and bool(self._commits))

    def _ready(self) -> bool:
        """Whether a transaction is due. While the disk is full, one is due every RETRY_SECONDS."""
        due = not self._failed or self._stopping
        if self._retry_at is not None and self._clock() >= self._retry_at:
            due = True
        return due and bool(self._commits)

    def _timeout(self) -> float | None:
        """Seconds until the next retry, or until a step has waited too long; None if neither is due."""
        due = [at for at in (self._run.queue.expires_at(), self._retry_at) if at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _answer(self, query: JournalQuery) -> None:
        found = query.find(self._journal, self._run)
        if found is None:
            return
        position = self._held_position
        with self._run.mutex:
            held_back = query.waits and self._withheld.holds_back(position)
            if held_back:
                self._withheld.add_answer(position, query.future, *found)
        if not held_back:
            answer(query.future, *found)

    def _write_all(self, commits: list[Commit]) -> bool:
        """Write commits in one transaction. If the disk is full, keep them queued and return False."""
        began = self._clock()
        try:
            self._journal.transaction(lambda: self._write(commits))
        except JournalError as error:
            if not is_full(error):
                raise  # whether it was committed is unknown: the process must end
            log.error("the journal cannot be written: %s; free space on its disk", error)
            with self._run.mutex:
                self._failed = True
                self._commits = commits + self._commits
                self._committing -= len(commits)
                self._retry_at = None
                self.hold()
            return False
        self._failed = False
        self._run.events.publish(Committed(time.time(), self._clock() - began, len(commits)))
        return True

    def _publish(self, commits: list[Commit]) -> None:
        """Announce commits that are durable on this machine, or hold them back until the mirror has them."""
        position = self._held_position
        with self._run.mutex:
            held_back = self._withheld.holds_commits or self._withheld.holds_back(position)
            if held_back:
                self._withheld.add_commits(position, commits)
        if not held_back:
            self._announce(commits)
        self.on_written()

    def _release(self) -> None:
        """Announce the commits and send the answers that waited for the mirror and need not wait longer."""
        with self._run.mutex:
            commits, answers = self._withheld.release()
        self._announce(commits)
        answer_all(answers)

    def _announce(self, commits: list[Commit]) -> None:
        for commit in commits:
            commit.committed()
        with self._run.mutex:
            self._committing -= len(commits)
            self._idle.notify_all()

    def _write(self, commits: list[Commit]) -> None:
        for commit in commits:
            commit.write(self._journal)

    def _free_log_space(self) -> bool:
        return reserve.free_log_space(self._journal, self._disk)

    def _look_for_space(self) -> None:
        with self._run.mutex:
            if self._disk.left(self._journal.log_bytes()) < 0:
                self._retry_at = self._clock() + RETRY_SECONDS
                return
            log.warning("the journal's disk has space again: training resumes, and nothing was lost")
            self._retry_at = None
            self._show_held()


def _nothing() -> None:
    """Do nothing, because no mirror waits for transactions."""
