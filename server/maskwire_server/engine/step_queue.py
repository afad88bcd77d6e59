"""The line: jobs in the order in which the device will take them, and the steps' numbers.

A step that is ahead of its turn waits beside the line. A number belongs to a step only once the step is
consumed: when one is withdrawn, those behind it lose theirs too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from maskwire_server.engine.admission import gap
from maskwire_server.engine.entries import Barrier, Evaluation, Job, Save, Step
from maskwire_server.engine.futures import refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.errors import Refused


class Line:
    """Only the engine's thread calls it."""

    def __init__(self, clock: Callable[[], float], gap_seconds: float) -> None:
        self._clock = clock
        self._gap_seconds = gap_seconds
        self._jobs: deque[Job] = deque()
        self._ahead: dict[int, Step] = {}
        self._numbered: dict[int, Step] = {}
        self._by_request: dict[str, Step] = {}
        self._running: set[Generation | Evaluation] = set()  # on the device, changing nothing
        self._parked: deque[Save] = deque()  # behind one that is being written
        self._assigned = 0
        self.refused_step: int | None = None
        """The first step whose sender was refused with it and has not sent another one under its number."""

    def __len__(self) -> int:
        """What waits for the device. A step beside the line does not: it must not keep the next one out."""
        return len(self._jobs) + len(self._parked)

    @property
    def busy(self) -> bool:
        """Some step is not settled yet."""
        return bool(self._numbered or self._ahead)

    @property
    def next_step(self) -> int:
        """The first number that no step has."""
        return self._assigned + 1

    def begin_at(self, step: int) -> None:
        """The history is at `step`; nothing is in flight."""
        self._assigned = step
        self.refused_step = None

    def request(self, request_id: str | None) -> Step | None:
        """The unsettled step of a request id."""
        return None if request_id is None else self._by_request.get(request_id)

    def waits(self, number: int | None) -> bool:
        """Whether a step waits beside the line for this number."""
        return number in self._ahead

    # In.

    def take(self, step: Step) -> None:
        """Put the next step in the line, and those behind it that waited for it."""
        self._register(step)
        self._give_number(step)
        self._jobs.append(step)
        successor = self._ahead.pop(self.next_step, None)
        if successor is not None:
            self.take(successor)

    def take_ahead(self, step: Step, number: int) -> None:
        """Let a step wait for its predecessor."""
        self._register(step)
        self._came(number)
        self._ahead[number] = step

    def append(self, job: Evaluation | Generation | Save | Barrier) -> None:
        """Put another job at the end."""
        self._jobs.append(job)

    def put_first(self, job: Save | Barrier) -> None:
        """Put a job before everything that has not reached the device."""
        self._jobs.appendleft(job)

    def _register(self, step: Step) -> None:
        if step.request.request_id is not None:
            self._by_request[step.request.request_id] = step

    def _give_number(self, step: Step) -> None:
        self._assigned += 1
        step.number = self._assigned
        self._numbered[step.number] = step
        self._came(step.number)

    def _came(self, number: int) -> None:
        if number == self.refused_step:
            self.refused_step = None

    # Out.

    def first(self) -> Job | None:
        """The next job for the device."""
        return self._jobs[0] if self._jobs else None

    def pop(self) -> None:
        """The first job goes to the device; a step stays in flight until it is settled."""
        job = self._jobs.popleft()
        if isinstance(job, Generation | Evaluation):
            self._running.add(job)

    def came_back(self, job: Generation | Evaluation) -> None:
        """A generation or an evaluation came back from the device."""
        self._running.discard(job)

    def interrupt(self, refusal: Refused) -> None:
        """End what runs on the device and changes nothing: it may have long to go, and can be asked again."""
        running, self._running = self._running, set()  # each is refused once
        for job in running:
            if isinstance(job, Generation):
                job.refuse(refusal)
            else:
                refuse(job.future, refusal)

    def park(self) -> None:
        """Take the first job, a save, out of the others' way."""
        job = self._jobs.popleft()
        assert isinstance(job, Save)
        self._parked.append(job)

    def unpark(self) -> None:
        """Another save was written: the next one comes first."""
        if self._parked:
            self._jobs.appendleft(self._parked.popleft())

    def settle(self, step: Step) -> None:
        """A step is durable, or was given up."""
        if self._numbered.get(step.number) is step:
            del self._numbered[step.number]
        if step.request.request_id is not None and self.request(step.request.request_id) is step:
            del self._by_request[step.request.request_id]

    def give_up(self, step: Step, error: Refused) -> None:
        """Refuse a step that was not consumed."""
        self.settle(step)
        for waiter in step.waiters:
            refuse(waiter, error)

    def withdraw(self, step: Step, error: Refused) -> None:
        """Give up a numbered step: its number is free again, and so are those behind it.

        Steps behind it that asked for their number are told so; the others move up.
        """
        self.give_up(step, error)
        behind = [job for job in self._jobs if isinstance(job, Step) and job.number > step.number]
        for number in [number for number in self._numbered if number > step.number]:
            del self._numbered[number]  # one that is on the device comes back as not computed
        self._assigned = step.number - 1
        self._refuse_ahead(step.number + 1, step.number)
        for later in behind:
            if later.request.step is None:
                self._give_number(later)
            else:
                self._jobs.remove(later)
                self.give_up(later, gap(later.request.step, step.number))

    def send_back(self, step: Step) -> None:
        """A step came back from the device because its predecessor was withdrawn."""
        if step.abandoned:
            self.settle(step)
        elif step.request.step in (None, self.next_step):  # another has come for the one that was withdrawn
            self.take(step)
        else:
            self.give_up(step, gap(step.request.step, self.next_step))

    def miss(self, number: int) -> None:
        """A step with this number was refused: until another has it, nothing behind waits for it."""
        if number < self.next_step or number in self._ahead:
            return
        if self.refused_step is None or number < self.refused_step:
            self.refused_step = number
        self._refuse_ahead(number + 1, number)

    def forget_abandoned(self) -> None:
        """Forget steps that have no number and nobody waits for: they may come again under another one."""
        for number, step in list(self._ahead.items()):
            if step.abandoned:
                self.settle(self._ahead.pop(number))
        for step in list(self._by_request.values()):
            if step.abandoned and self._numbered.get(step.number) is not step:  # it will be sent back
                self.settle(step)

    def _refuse_ahead(self, first: int, expected: int) -> None:
        """Refuse the waiting steps from number `first` on: `expected`, before them, is not there."""
        for number in sorted(number for number in self._ahead if number >= first):
            self.give_up(self._ahead.pop(number), gap(number, expected))

    def expire(self) -> None:
        """Refuse what has waited too long for its predecessor, and what waits behind it."""
        limit = self._clock() - self._gap_seconds
        expired = [number for number, step in self._ahead.items() if step.arrived <= limit]
        if expired:
            self._refuse_ahead(min(expired), self.next_step)

    def expires_at(self) -> float | None:
        """When `expire` has something to do."""
        return min((step.arrived + self._gap_seconds for step in self._ahead.values()), default=None)

    def refuse_steps(self, why: Callable[[Step], Refused]) -> None:
        """Refuse every step that has not reached the device."""
        waiting = [job for job in self._jobs if isinstance(job, Step)]
        for step in waiting:
            self._jobs.remove(step)
        self._assigned -= len(waiting)
        for step in [*waiting, *self._ahead.values()]:
            self.give_up(step, why(step))
        self._ahead.clear()
        self.refused_step = None

    def refuse_saves(self, refusal: Refused) -> None:
        """Refuse every save that has not begun: the state that it was to be of is gone."""
        waiting = [job for job in [*self._jobs, *self._parked] if isinstance(job, Save)]
        self._jobs = deque(job for job in self._jobs if not isinstance(job, Save))
        self._parked.clear()
        for save in waiting:
            for waiter in save.waiters:
                refuse(waiter, refusal)

    def refuse_all(self, refusal: Refused) -> None:
        """Refuse every job that has not reached the device, and those that have and change nothing."""
        self.refuse_steps(lambda _: refusal)
        self.refuse_saves(refusal)
        self.interrupt(refusal)
        for job in self._jobs:
            if isinstance(job, Evaluation):
                refuse(job.future, refusal)
            elif isinstance(job, Generation | Barrier):
                job.refuse(refusal)
        self._jobs.clear()

    def abandon(self, refusal: Refused) -> None:
        """Refuse everything, steps on the device and steps not yet durable too: the process ends."""
        self.refuse_all(refusal)
        for step in list(self._numbered.values()):
            self.give_up(step, refusal)
