"""Steps in flight in virtual time: the client's conversations against the server's line and admission.

Each request and each answer takes a time of its own, attempts are cut off by deadlines and resets, and the
server is killed and comes back with what it had answered. The good batches must be applied once each, in
the order in which they were handed in, and nobody may be rescued by `gap_seconds`.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from maskwire.errors import REASONS, Failure, MaskwireError, UnavailableError
from maskwire.protocol.calls import Call, Pause, RetryPolicy, Until
from maskwire.protocol.codec import hash_of, step_request
from maskwire.protocol.writer import Writing
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import step_digest
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.engine.admission import Known, Position, StepFacts, Verdict, admit_step, gap
from maskwire_server.engine.entries import Step
from maskwire_server.engine.pipeline import AHEAD
from maskwire_server.engine.step_queue import Line
from maskwire_server.errors import REASONS as SERVER_REASONS
from maskwire_server.errors import Refused
from maskwire_server.requests import SessionRef, StepRequest
from maskwire_server.results import RunState

RUNS = int(os.environ.get("MASKWIRE_WINDOW_RUNS", "40"))
GAP_SECONDS, WINDOW = 1000.0, 6
GOOD, BAD, FAILING = "good", "refused before it comes", "fails on the device"


@dataclass(frozen=True)
class Weather:
    """What the requests meet."""

    travel: tuple[float, ...] = (0.0, 0.001, 0.005, 0.02, 0.06)
    """Seconds that a message takes, one of these."""
    computing: float = 0.003
    """Seconds a step."""
    timeout: float = 60.0
    resets: float = 0.0
    """The share of attempts whose connection breaks."""
    kills: int = 0


@dataclass(eq=False)
class Attempt:
    """One call of one step."""

    index: int
    request: pb.TrainStepRequest
    life: int
    over: bool = False
    future: Future[Any] = field(default_factory=Future)


UNREACHABLE = Failure(UnavailableError("it cannot be reached", reason="UNAVAILABLE"), True, unreachable=True)


class World:
    def __init__(self, seed: int, kinds: list[str], weather: Weather) -> None:
        self.draw, self.kinds, self.weather = random.Random(seed), kinds, weather
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        # The server: `applied`, `answers` and `digest` are its disk.
        self.applied: list[int] = []
        self.answers: dict[str, tuple[int, bytes, bytes]] = {}
        self.digest = bytes(32)
        self.session = SessionRef("run", 1, 1)
        self.life, self.alive = 0, False
        self.begin_life()
        for _ in range(weather.kills):
            self.later(self.draw.uniform(0.01, 0.4), self.kill)
        # The client.
        policy = RetryPolicy(300, weather.timeout)
        self.writing = Writing("there", policy, lambda _: None, lambda: self.now, "me", WINDOW)
        opening = self.writing.open()
        next(opening)
        with pytest.raises(StopIteration):
            opening.send(self.opened())
        self.talks: list[Any] = []
        self.effects: list[Any] = []
        self.ended: list[int | MaskwireError | None] = []

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.count), act))

    def travel(self) -> float:
        return self.draw.choice(self.weather.travel)

    # The server.

    def begin_life(self) -> None:
        self.life += 1
        self.alive = True
        self.line = Line(lambda: self.now, GAP_SECONDS)
        self.line.begin_at(len(self.applied))
        self.device: list[Step] = []
        self.calls: list[Attempt] = []

    def kill(self) -> None:
        self.alive = False
        for attempt in self.calls:
            self.reply(attempt, UNREACHABLE)
        self.later(self.draw.choice((0.05, 0.5)), self.begin_life)

    def opened(self) -> pb.OpenSessionResponse:
        return pb.OpenSessionResponse(
            session=pb.SessionRef(run_id="run", lineage=1, epoch=1), durable_step=len(self.applied),
            digest=self.digest, limits=pb.Limits(window=8, max_message_bytes=2**20),
        )  # fmt: skip

    def arrive(self, attempt: Attempt) -> None:
        if not self.alive or attempt.life != self.life:
            self.reply(attempt, UNREACHABLE)
            return
        self.calls.append(attempt)
        attempt.future.add_done_callback(lambda _: self.answered(attempt))
        request = attempt.request
        if attempt.over:
            attempt.future.cancel()
        if self.kinds[attempt.index] == BAD:
            self.line.miss(request.step)
            self.refuse(attempt, Refused("INVALID_FIELD", "the mask id"))
        else:
            payload = Payload(Batch(None, 1, 1), Modes())  # type: ignore[arg-type]
            step = Step(
                StepRequest(payload, self.session, request.step, request.request_id), hash_of(request), b"",
                [attempt.future], self.now,
            )  # fmt: skip
            try:
                self.admit(step)
            except Refused as refusal:
                self.refuse(attempt, refusal)
        self.feed()

    def admit(self, step: Step) -> None:
        """As the pipeline does."""
        request, line = step.request, self.line
        assert request.request_id is not None
        line.forget_abandoned()
        earlier, known = line.request(request.request_id), None
        if earlier is not None:
            known = Known(earlier.number or earlier.request.step, earlier.payload_hash, True)
        elif request.request_id in self.answers:
            known = Known(*self.answers[request.request_id][:2], False)
        facts = StepFacts(
            self.session, request.step, step.payload_hash, known, line.waits(request.step), len(line), 64
        )
        at = Position(RunState.SERVING, "run", 1, 1, "me", False, line.next_step, 8, line.refused_step)
        verdict = admit_step(facts, at)
        if verdict is Verdict.REPLAY:
            self.give(step, *self.answers[request.request_id][::2])
        elif verdict is Verdict.JOIN and earlier is not None:
            earlier.waiters += step.waiters
        elif verdict is Verdict.WAIT and request.step is not None:
            line.take_ahead(step, request.step)
        else:
            line.take(step)

    def feed(self) -> None:
        while len(self.device) < AHEAD and (job := self.line.first()) is not None:
            assert isinstance(job, Step)
            self.line.pop()
            if job.abandoned:
                self.line.withdraw(job, gap(job.number, job.number))
                continue
            self.device.append(job)
            if len(self.device) == 1:
                self.compute()

    def compute(self) -> None:
        step, life = self.device[0], self.life
        self.later(self.weather.computing, lambda: self.computed(step, life))

    def computed(self, step: Step, life: int) -> None:
        if life != self.life or not self.alive:
            return
        self.device.pop(0)
        if step.number != len(self.applied) + 1:
            self.line.send_back(step)
        elif self.kinds[self.index_of(step)] == FAILING:
            self.line.withdraw(step, Refused("INTERNAL", "it failed", error_id="e"))
            self.line.miss(step.number)
        else:
            self.applied.append(self.index_of(step))
            self.digest = step_digest(self.digest, 1, step.number, step.payload_hash, 1)
            self.answers[step.request.request_id or ""] = step.number, step.payload_hash, self.digest
            self.line.settle(step)
            self.give(step, step.number, self.digest)
        if self.device:
            self.compute()
        self.feed()

    @staticmethod
    def index_of(step: Step) -> int:
        return int(step.request.request_id or "")

    @staticmethod
    def give(step: Step, number: int, digest: bytes) -> None:
        for waiter in step.waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(pb.TrainStepResponse(step=number, digest=digest, outcome=1))

    def answered(self, attempt: Attempt) -> None:
        self.calls.remove(attempt)
        if attempt.future.cancelled():
            return
        error = attempt.future.exception()
        if isinstance(error, Refused):
            self.refuse(attempt, error)
        else:
            self.reply(attempt, attempt.future.result())

    def refuse(self, attempt: Attempt, refusal: Refused) -> None:
        reason = refusal.reason
        metadata = {name: str(value) for name, value in refusal.metadata.items()}
        wait = SERVER_REASONS[reason].retry_after_seconds
        error = REASONS[reason](refusal.message, reason=reason, metadata=metadata)
        self.reply(attempt, Failure(error, wait is not None, retry_after=wait))

    # On the way.

    def send(self, index: int, call: Call) -> None:
        if call.method == "OpenSession":
            self.later(
                2 * self.travel(), lambda: self.go_on(index, self.opened() if self.alive else UNREACHABLE)
            )
            return
        request = pb.TrainStepRequest.FromString(call.request.SerializeToString())
        attempt = Attempt(index, request, self.life)
        self.later(self.travel(), lambda: None if attempt.over else self.arrive(attempt))
        self.later(call.timeout, lambda: self.cut(attempt, "DEADLINE_EXCEEDED"))
        if self.draw.random() < self.weather.resets:
            self.later(self.draw.uniform(0, 0.1), lambda: self.cut(attempt, "UNAVAILABLE"))

    def cut(self, attempt: Attempt, reason: str) -> None:
        if attempt.over:
            return
        attempt.over = True
        if attempt in self.calls:
            attempt.future.cancel()
        error = UnavailableError("cut off", reason=reason)
        self.go_on(attempt.index, Failure(error, True, unreachable=True))

    def reply(self, attempt: Attempt, answer: Any) -> None:
        def deliver() -> None:
            if not attempt.over:
                attempt.over = True
                self.go_on(attempt.index, answer)

        self.later(self.travel(), deliver)

    # The client.

    def hand_in(self) -> None:
        """As a caller does: the next batch once the one before it has its place."""
        while len(self.talks) < len(self.kinds) and not (self.talks and isinstance(self.effects[-1], Until)):
            index = len(self.talks)
            self.talks.append(self.writing.train(step_request(str(index), [[index % 250, index // 250]])))
            self.effects.append(None)
            self.ended.append(None)
            self.go_on(index, None)

    def go_on(self, index: int, reply: Any) -> None:
        self.effects[index] = None
        try:
            effect = self.talks[index].send(reply)
            while isinstance(effect, Until) and effect.holds():
                effect = self.talks[index].send(None)
        except StopIteration as done:
            self.ended[index] = done.value.step
        except MaskwireError as error:
            self.ended[index] = error
        else:
            self.effects[index] = effect
            if isinstance(effect, Call):
                self.send(index, effect)
            elif isinstance(effect, Pause):
                self.later(effect.seconds, lambda: self.go_on(index, None))

    def play(self) -> None:
        """Until every batch has its end."""
        while True:
            moved = True
            while moved:
                self.hand_in()
                ready = [
                    index
                    for index, effect in enumerate(self.effects)
                    if isinstance(effect, Until) and effect.holds()
                ]
                for index in ready[:1]:
                    self.go_on(index, None)
                moved = bool(ready)
            if len(self.ended) == len(self.kinds) and None not in self.ended:
                return
            self.now, _, act = heapq.heappop(self.events)
            act()


@pytest.mark.parametrize(
    "weather",
    [
        Weather(),
        Weather(travel=(0.0, 0.01, 0.3, 2.0)),
        Weather(resets=0.15),
        Weather(kills=3, resets=0.05),
        Weather(timeout=0.1, travel=(0.0, 0.001, 0.02, 0.06), computing=0.02),
    ],
    ids=["travel", "long travel", "resets", "kills", "deadlines"],
)
def test_good_batches_are_applied_once_in_their_order_whatever_is_refused_between(weather: Weather) -> None:
    for seed in range(RUNS):
        draw = random.Random(seed)
        kinds = [draw.choice((GOOD, GOOD, GOOD, BAD, FAILING)) for _ in range(24)]
        random.seed(seed)  # of the back-off
        world = World(seed, kinds, weather)
        world.play()
        good = [index for index, kind in enumerate(kinds) if kind == GOOD]
        assert world.applied == good, seed
        assert [world.ended[index] for index in good] == list(range(1, len(good) + 1)), seed
        refusals = {BAD: "INVALID_FIELD", FAILING: "INTERNAL"}
        for kind, end in zip(kinds, world.ended, strict=True):
            assert kind == GOOD or (isinstance(end, MaskwireError) and end.reason == refusals[kind]), seed
        assert world.now < 120, f"seed {seed}: nobody waits for gap_seconds"
