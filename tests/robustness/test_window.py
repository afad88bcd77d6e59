"""Steps in flight in virtual time: the client's operations against the server's admission and queue.

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

import numpy as np
import pytest

from maskwire.errors import REASONS, Failure, MaskwireError, UnavailableError
from maskwire.protocol.codec import hash_of
from maskwire.protocol.effects import Call, Notify, Operation, Pause, Until
from maskwire.protocol.pending_step import PendingStep
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.writer import Writer
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion
from maskwire.v1.values import Losses, Outcome, RunState
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.config import ServeConfig
from maskwire_server.engine.admission import StepAdmission
from maskwire_server.engine.commits import StepCommit
from maskwire_server.engine.entries import Step
from maskwire_server.engine.executor import Executor
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import REASONS as SERVER_REASONS
from maskwire_server.errors import Refused
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import Lineage, StepRecord
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SessionRef, StepRequest
from maskwire_server.results import StepAnswer, StepResult

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


class Disk:
    """The committer, the journal and their disk in one: everything is durable at once."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def enqueue(self, commit: StepCommit) -> None:
        self.records.append(commit.record)
        commit.committed()

    def read(self, question: Any, lineage: int, step: int) -> StepRecord | None:
        assert (question, lineage) == (Journal.step, 1)
        return next((one for one in self.records if one.step == step), None)

    def wake(self) -> None: ...

    def log_bytes(self) -> int:
        return 0

    def left(self, waiting: int) -> int:
        return 2**40 - waiting


class Idle:
    """No checkpoint is due."""

    busy = False

    def due(self, step: int) -> bool:
        return not step


class Packed(Payload):
    """As much of a batch as its hash, and whether the device fails with it."""

    def hash(self, version: DigestVersion) -> bytes:
        return self.sent_hash

    def encode(self) -> bytes:
        return b""

    sent_hash = b""


class World:
    def __init__(self, seed: int, kinds: list[str], weather: Weather) -> None:
        self.draw, self.kinds, self.weather = random.Random(seed), kinds, weather
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.applied: list[int] = []
        self.disk = Disk()
        self.session = SessionRef("run", 1, 1)
        self.life, self.alive = 0, False
        self.begin_life()
        for _ in range(weather.kills):
            self.later(self.draw.uniform(0.01, 0.4), self.kill)
        # The client.
        policy = RetryPolicy(300, weather.timeout)
        self.writer = Writer("there", policy, lambda _: None, lambda: self.now, "me", WINDOW)
        opening = self.writer.open()
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
        disk: Any = self.disk
        idle: Any = Idle()
        serve = ServeConfig(gap_seconds=GAP_SECONDS, window=8)
        self.run = Run(serve, lambda: self.now)
        self.run.conditions.set(RunState.RECOVERING, False)
        self.run.head.move(HistoryPosition("run", 1, len(self.applied), self.digest))
        self.run.lease.open(1, "me")
        self.run.lineages = {1: Lineage(1, None, 0, bytes(32), None, None)}
        self.steps = StepAdmission(self.run, disk, serve, lambda: self.now)
        device: Any = self
        self.executor = Executor(
            self.run, disk, device, idle, idle, idle, journal=disk, disk=disk,
            quarantine=None, serve=serve, configuration_id=1, clock=lambda: self.now,
        )  # fmt: skip
        self.computing: Step | None = None
        self.calls: list[Attempt] = []

    def usable_after(self, error: BaseException) -> bool:
        return True

    def train_step(self, *arguments: Any) -> StepResult:
        """As the device does, at the end of the step's time."""
        assert self.computing is not None
        if self.kinds[self.index_of(self.computing)] == FAILING:
            raise RuntimeError("it failed")
        self.applied.append(self.index_of(self.computing))
        return StepResult(Outcome.APPLIED, Losses(1.0, 1.0), 1.0)

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
            self.steps.refused(self.session, request.step)
            self.refuse(attempt, Refused("INVALID_FIELD", "the mask id"))
        else:
            payload = Packed(Batch(np.zeros((1, 1), int), 1, 1), Modes())
            object.__setattr__(payload, "sent_hash", hash_of(request, DigestVersion(1)))
            try:
                sent = StepRequest(payload, self.session, request.step, request.request_id)
                self.steps.admit(sent, attempt.future)
            except Refused as refusal:
                self.refuse(attempt, refusal)
        self.feed()

    def feed(self) -> None:
        """As the executor does, but that the time of a step passes before it is computed."""
        while self.computing is None and (step := self.executor._next()) is not None:
            assert isinstance(step, Step)
            self.computing, life = step, self.life
            self.later(self.weather.computing, lambda life=life: self.computed(life))

    def computed(self, life: int) -> None:
        if life != self.life or not self.alive:
            return
        assert self.computing is not None
        self.executor._train(self.computing)
        self.computing = None
        self.feed()

    @property
    def digest(self) -> bytes:
        return self.disk.records[-1].digest if self.disk.records else bytes(32)

    @staticmethod
    def index_of(step: Step) -> int:
        return int(step.request.request_id or "")

    def answered(self, attempt: Attempt) -> None:
        self.calls.remove(attempt)
        if attempt.future.cancelled():
            return
        error = attempt.future.exception()
        if isinstance(error, Refused):
            self.refuse(attempt, error)
        else:
            answer: StepAnswer = attempt.future.result()
            self.reply(attempt, pb.TrainStepResponse(step=answer.step, digest=answer.digest, outcome=1))

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

    def train(self, pending: PendingStep) -> Operation[Any]:
        """What a client does with a step."""
        yield from self.writer.enter(pending)
        return (yield from self.writer.finish(pending))

    def hand_in(self) -> None:
        """As a caller does: the next batch once the one before it has its place."""
        while len(self.talks) < len(self.kinds) and not (self.talks and isinstance(self.effects[-1], Until)):
            index = len(self.talks)
            pending = self.writer.new_step([[index % 250, index // 250]])
            pending.request.request_id = str(index)
            self.talks.append(self.train(pending))
            self.effects.append(None)
            self.ended.append(None)
            self.go_on(index, None)

    def go_on(self, index: int, reply: Any) -> None:
        self.effects[index] = None
        try:
            effect = self.talks[index].send(reply)
            while isinstance(effect, Notify) or (isinstance(effect, Until) and effect.holds()):
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
