"""The executor's queue, and the reorder table of steps that arrived before their predecessors.

Queued steps have no number. The executor numbers a step when it takes the step from the queue, so that
nothing has to be renumbered when a queued step is refused or abandoned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from maskwire_server.engine.admission_rules import gap
from maskwire_server.engine.entries import Drain, Entry, Evaluation, Restore, Save, SessionOpening, Step
from maskwire_server.engine.futures import refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.errors import Refused


class Queue:
    """Entries for the executor, in order. Callers of the methods must hold the run's mutex.

    Only status reports call `len`, `busy`, `reads` and `without_reads` without the mutex. Reads are
    evaluations and generations. Early steps are steps that arrived before their predecessors.
    """

    def __init__(self, clock: Callable[[], float], gap_seconds: float) -> None:
        self._clock = clock
        self._gap_seconds = gap_seconds
        self._entries: deque[Entry] = deque()
        self._early: dict[int, Step] = {}
        self._by_id: dict[str, Step] = {}
        self._by_number: dict[int, Step] = {}
        self._parked: deque[Save] = deque()
        self._steps = 0  # in `_entries`
        self.computing: Step | None = None
        """The step that the executor is computing."""
        self.reading: Evaluation | Generation | None = None
        """The evaluation or generation that the executor is running."""
        self._refused: set[int] = set()  # numbers whose step was refused, until another step takes them

    def __len__(self) -> int:
        """The number of entries that wait, except evaluations and generations whose callers have left.

        Steps that wait for a predecessor do not count, because they must not keep it out of the queue.
        """
        return self.without_reads + self.reads()

    @property
    def busy(self) -> bool:
        """Whether a step is queued, being computed, or not durable yet."""
        return bool(self._steps or self._by_number or self._early)

    @property
    def ahead(self) -> int:
        """The number of steps that will be numbered before a step that is queued now."""
        return self._steps + (self.computing is not None)

    @property
    def refused_number(self) -> int | None:
        """The lowest number of a refused step that no other step has taken since; None if there is none."""
        return min(self._refused, default=None)

    @property
    def step_waits(self) -> bool:
        """Whether a step is queued."""
        return bool(self._steps)

    @property
    def first_arrived(self) -> float | None:
        """When the first queued step or requested save arrived; None if none is queued."""
        waiting = (entry.arrived for entry in self._entries if isinstance(entry, Step | Save))
        return next((arrived for arrived in waiting if arrived is not None), None)

    def reads(self, credential: str | None = None) -> int:
        """The number of evaluations and generations that wait: those of one credential, or all."""
        return sum(
            isinstance(entry, Evaluation | Generation)
            and not entry.future.done()
            and credential in (None, entry.request.credential)
            for entry in self._entries.copy()  # atomic, whatever other threads do
        )

    @property
    def without_reads(self) -> int:
        """The number of entries that wait, except evaluations and generations.

        The limit on steps and saves is compared with this number, so that reads cannot take their places.
        """
        entries = self._entries.copy()  # atomic, whatever other threads do
        return len(self._parked) + sum(not isinstance(entry, Evaluation | Generation) for entry in entries)

    def saves(self) -> list[Save]:
        """The saves that wait."""
        return [entry for entry in [*self._entries, *self._parked] if isinstance(entry, Save)]

    # Finding a step.

    def with_id(self, request_id: str | None) -> Step | None:
        """The step in flight that has this request id; None if there is none."""
        return None if request_id is None else self._by_id.get(request_id)

    def with_number(self, number: int | None) -> Step | None:
        """The step in flight that has this number or asked for it; None if there is none."""
        return None if number is None else self._by_number.get(number) or self._early.get(number)

    def reserve_id(self, step: Step) -> None:
        """Index a step by its request id, so that retries can join it. `settle` removes it from the index."""
        if step.request.request_id is not None:
            self._by_id[step.request.request_id] = step

    def settle(self, step: Step) -> None:
        """Remove a step from the indexes by id and number, because it is durable or was refused."""
        request_id, asked = step.request.request_id, step.request.step
        for number in {step.number, asked}:
            if number is not None and self._by_number.get(number) is step:
                del self._by_number[number]
        if request_id is not None and self._by_id.get(request_id) is step:
            del self._by_id[request_id]

    # Into the queue.

    def push_step(self, step: Step, next_number: int) -> None:
        """Queue the step that will be numbered `next_number`, and the steps that waited for it."""
        successor: Step | None = step
        while successor is not None:
            self.reserve_id(successor)
            if successor.request.step is not None:
                self._by_number[successor.request.step] = successor
            self._arrived(next_number)
            self._entries.append(successor)
            self._steps += 1
            next_number += 1
            successor = self._early.pop(next_number, None)

    def keep_early(self, step: Step, number: int) -> None:
        """Keep a step in the reorder table until its predecessor arrives."""
        self.reserve_id(step)
        self._arrived(number)
        self._early[number] = step

    def replace(self, old: Step, new: Step) -> bool:
        """Replace an abandoned step by one with the same number. Return False if it is not in the queue."""
        if old not in self._entries:
            return False
        self.settle(old)
        self._entries[self._entries.index(old)] = new
        self.reserve_id(new)
        if new.request.step is not None:
            self._by_number[new.request.step] = new
        return True

    def push(self, entry: Evaluation | Generation | Save | Drain) -> None:
        """Queue an entry that is not a step."""
        self._entries.append(entry)

    def push_first(self, save: Save) -> None:
        """Queue a save before all other entries."""
        self._entries.appendleft(save)

    def push_ahead(self, entry: SessionOpening | Restore) -> None:
        """Queue an entry before all others except the openings of sessions, which came first.

        An epoch is recorded before the epochs that supersede it; otherwise its nonce could be used again.
        """
        openings = [at for at, waiting in enumerate(self._entries) if isinstance(waiting, SessionOpening)]
        self._entries.insert(openings[-1] + 1 if openings else 0, entry)

    def _arrived(self, number: int) -> None:
        self._refused.discard(number)

    # Out of the queue.

    def first(self) -> Entry | None:
        """The first entry of the queue; None if it is empty."""
        return self._entries[0] if self._entries else None

    def pop(self) -> Entry:
        """Remove and return the first entry."""
        entry = self._entries.popleft()
        if isinstance(entry, Step):
            self._steps -= 1
        return entry

    def bring_forward(self) -> bool:
        """Move the first entry that is not a read to the front; return False if there is none."""
        for entry in self._entries:
            if not isinstance(entry, Evaluation | Generation):
                self._entries.remove(entry)
                self._entries.appendleft(entry)
                return True
        return False

    def pop_session_opening(self) -> SessionOpening | None:
        """Remove and return the first entry if it is the opening of a session; otherwise return None."""
        opening = self.first()
        if not isinstance(opening, SessionOpening):
            return None
        self._entries.popleft()
        return opening

    def pop_restore(self) -> Restore | None:
        """Remove and return the first restore that waits, or return None."""
        restore = next((entry for entry in self._entries if isinstance(entry, Restore)), None)
        if restore is not None:
            self._entries.remove(restore)
        return restore

    def start(self, step: Step, number: int) -> None:
        """Give the first step its number, and mark it as being computed. The caller then pops it."""
        step.number = number
        self._by_number[number] = step
        self._arrived(number)
        self.computing = step

    def park(self, save: Save) -> None:
        """Set a save aside until the checkpoint that is being written is done."""
        self._parked.append(save)

    def unpark(self) -> None:
        """Queue the first save that `park` set aside, at the front."""
        if self._parked:
            save = self._parked.popleft()
            if save.arrived is not None:  # until now it waited for the other checkpoint, not for a read
                save.arrived = self._clock()
            self._entries.appendleft(save)

    # Refusals.

    def refuse_step(self, step: Step, refusal: Refused) -> None:
        """Refuse a step that has not been trained, and remove it from the indexes."""
        self.settle(step)
        for waiter in step.waiters:
            refuse(waiter, refusal)

    def mark_refused(self, number: int) -> None:
        """Mark step `number` as refused, and refuse later steps until another step has this number."""
        self._refused.add(number)
        self.refuse_behind(number)

    def refuse_behind(self, number: int) -> None:
        """Refuse all waiting steps that asked for a number above `number`, because no step has `number`."""
        for entry in [entry for entry in self._entries if isinstance(entry, Step)]:
            if entry.request.step is not None and entry.request.step > number:
                self._remove(entry)
                self.refuse_step(entry, gap(entry.request.step, number))
        self._refuse_early(number + 1, number)

    def _refuse_early(self, first: int, expected: int) -> None:
        for number in sorted(number for number in self._early if number >= first):
            self.refuse_step(self._early.pop(number), gap(number, expected))

    def forget_abandoned_early(self) -> None:
        """Drop steps that wait for a predecessor if no caller waits for them any more.

        The client may send them again under another number.
        """
        for number, step in list(self._early.items()):
            if step.abandoned:
                self.settle(self._early.pop(number))

    def forget_abandoned_reads(self) -> None:
        """Drop evaluations and generations if no caller waits for them any more."""
        self._entries = deque(
            entry
            for entry in self._entries
            if not (isinstance(entry, Evaluation | Generation) and entry.future.done())
        )

    def withdraw(self, step: Step, next_number: int) -> bool:
        """Remove an abandoned step and refuse the steps after it. Return False if it is not in the queue."""
        steps = [entry for entry in self._entries if isinstance(entry, Step)]
        if step not in steps:
            return False
        self._remove(step)
        self.settle(step)
        self.refuse_behind(next_number - len(steps) + steps.index(step))
        return True

    def expire(self, next_number: int) -> None:
        """Refuse steps that waited `gap_seconds` for their predecessor, and the steps after them."""
        limit = self._clock() - self._gap_seconds
        expired = [number for number, step in self._early.items() if step.arrived <= limit]
        if expired:
            self._refuse_early(min(expired), next_number)

    def expires_at(self) -> float | None:
        """The time at which `expire` will next refuse a step that waits for its predecessor, or None."""
        return min((step.arrived + self._gap_seconds for step in self._early.values()), default=None)

    def refuse_steps(self, why: Callable[[Step], Refused]) -> None:
        """Refuse every step that is not being computed, each with the refusal that `why` returns."""
        waiting = [entry for entry in self._entries if isinstance(entry, Step)]
        for step in waiting:
            self._remove(step)
        for step in [*waiting, *self._early.values()]:
            self.refuse_step(step, why(step))
        self._early.clear()
        self._refused.clear()

    def refuse_saves(self, refusal: Refused) -> None:
        """Refuse every save that has not begun, because the state that it would have saved is gone."""
        waiting = self.saves()
        self._entries = deque(entry for entry in self._entries if not isinstance(entry, Save))
        self._parked.clear()
        for save in waiting:
            for waiter in save.waiters:
                refuse(waiter, refusal)

    def interrupt(self, refusal: Refused) -> None:
        """End the running evaluation or generation with a refusal. The client can safely repeat it."""
        if self.reading is not None:
            refuse(self.reading.future, refusal)
        self.reading = None  # so that it is refused only once

    def refuse_all(self, refusal: Refused) -> None:
        """Refuse every entry, and the running evaluation or generation."""
        self.refuse_steps(lambda _: refusal)
        self.refuse_saves(refusal)
        self.interrupt(refusal)
        for entry in self._entries:
            if isinstance(entry, Evaluation | Generation | Restore | Drain):
                refuse(entry.future, refusal)
        self._entries.clear()

    def _remove(self, step: Step) -> None:
        self._entries.remove(step)
        self._steps -= 1
