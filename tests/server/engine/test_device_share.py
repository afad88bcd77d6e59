"""Readers share the device with a training client: neither its throughput nor its deadline suffers more than
documented. Seconds are those of the trainer's clock, so that no test depends on the machine's speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from counter import CounterTrainer
from rig import WAIT, Rig, bare, payload, reason, wait_for

from maskwire.protocol.retry import RetryPolicy
from maskwire_server.batch import Prompts
from maskwire_server.config import ServeConfig
from maskwire_server.engine.device_share import IDLE_SECONDS, DeviceSharing
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.entries import Save
from maskwire_server.engine.queue import Queue
from maskwire_server.errors import Refused, Unwanted
from maskwire_server.requests import EvalRequest, GenerateRequest, SaveRequest, SessionRequest
from maskwire_server.results import (
    EvalOptions,
    EvalResult,
    GenerateOptions,
    GenerationState,
    SessionAnswer,
    StepResult,
)

STEP_SECONDS, PART_SECONDS = 0.5, 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(CounterTrainer):
    """Steps and parts of reads take time of `clock`."""

    clock = Clock()
    parts = 10
    """Of an evaluation."""
    parts_of_a_pass = 1
    """Of a generation."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[tuple[str, float, float]] = []
        self.part_begins = threading.Semaphore(0)
        self.parts_may_end = threading.Event()
        self.parts_may_end.set()
        self.ready: Callable[[], bool] = lambda: True
        """Parts of a read end when this holds: clients have as much time to send as on a real device."""

    def part(self) -> None:
        self.part_begins.release()
        self.parts_may_end.wait(WAIT)
        wait_for(self.ready)
        self.clock.now += PART_SECONDS

    def train_step(self, *arguments: Any) -> StepResult:
        began = self.clock.now
        self.clock.now += STEP_SECONDS
        self.used.append(("step", began, self.clock.now))
        return super().train_step(*arguments)

    def eval_loss(self, batch: Any, options: EvalOptions, wanted: Callable[[], bool] = bool) -> EvalResult:
        began = self.clock.now
        for _ in range(self.parts):
            if not wanted():
                self.used.append(("ended", began, self.clock.now))
                raise Unwanted("ended")
            self.part()
        self.used.append(("read", began, self.clock.now))
        return super().eval_loss(batch, options)

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        began = self.clock.now
        for state in super().generate(prompts, options):
            for _ in range(self.parts_of_a_pass):
                if not wanted():
                    self.used.append(("ended", began, self.clock.now))
                    raise Unwanted("ended")
                self.part()
            yield state
        self.used.append(("read", began, self.clock.now))


@pytest.fixture
def clock() -> Clock:
    Slow.clock = Clock()
    return Slow.clock


def evaluation(credential: str = "") -> EvalRequest:
    return EvalRequest(payload(0).batch, EvalOptions((0, 1)), credential)


def generation(columns: int, credential: str = "") -> GenerateRequest:
    return GenerateRequest(Prompts.nothing(1, columns), GenerateOptions((0,), 0), credential=credential)


def seconds(used: list[tuple[str, float, float]], kind: str) -> float:
    return sum(ended - began for what, began, ended in used if what == kind)


def start(rig: Rig, clock: Clock, **serve: Any) -> tuple[Engine, Slow]:
    engine = rig.start(Slow, clock=clock, serve=serve)
    assert isinstance(rig.trainer, Slow)
    return engine, rig.trainer


@pytest.mark.parametrize("window", [1, 4])
def test_ten_of_the_longest_reads_cost_a_training_client_half_its_throughput_and_never_its_deadline(
    rig: Rig, clock: Clock, window: int
) -> None:
    Slow.parts = int(ServeConfig().max_read_seconds / PART_SECONDS)
    engine, trainer = start(rig, clock)
    waits: list[float] = []
    done = threading.Event()

    def train(client: int) -> None:
        seed = client
        while not done.is_set():
            answer = engine.train_step(bare(seed)).result(WAIT)
            waits.append(answer.queue_seconds + answer.compute_seconds)
            seed += window

    def a_step_waits() -> bool:
        now = engine.status()
        return now.queue_length > now.device_share.waiting_reads

    trainer.ready = a_step_waits
    clients = [threading.Thread(target=train, args=(client,)) for client in range(window)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: len(waits) > 10)
        reads = [engine.eval_loss(evaluation()) for _ in range(10)]
        for read in reads:
            read.result(WAIT)
        ended = clock.now
        wait_for(lambda: clock.now > ended + 40)
    finally:
        done.set()
        for client in clients:
            client.join(WAIT)
    used = trainer.used
    at = [index for index, (what, *_) in enumerate(used) if what == "read"]
    assert len(at) == 10
    for this, following in zip(at, [*at[1:], len(used)], strict=True):
        _, began, end = used[this]
        assert seconds(used[this:following], "step") >= end - began == Slow.parts * PART_SECONDS
    stretch = used[at[0] :]
    assert seconds(stretch, "step") >= 0.5 * (stretch[-1][2] - stretch[0][1])
    longest = Slow.parts * PART_SECONDS + (window + 1) * STEP_SECONDS
    assert max(waits) <= longest < RetryPolicy().attempt_timeout
    share = engine.status().device_share
    assert share.read_seconds == 10 * Slow.parts * PART_SECONDS
    assert share.step_seconds == pytest.approx(seconds(used, "step"))


READS: dict[str, tuple[int, Callable[[Engine], Future[Any]]]] = {
    "evaluation": (1, lambda engine: engine.eval_loss(evaluation())),
    "generation of many passes": (1, lambda engine: engine.generate(generation(100)).future),
    "generation of one long pass": (100, lambda engine: engine.generate(generation(1)).future),
}
"""Reads of a hundred parts, and how many parts an unmasking pass has."""


def begin_read(trainer: Slow, engine: Engine, kind: str) -> Future[Any]:
    """A read that is in its first part, which ends with `parts_may_end`."""
    Slow.parts = 100
    Slow.parts_of_a_pass, begin = READS[kind]
    trainer.parts_may_end.clear()
    read = begin(engine)
    assert trainer.part_begins.acquire(timeout=WAIT)
    return read


@pytest.mark.parametrize("what", ["step", "save"])
@pytest.mark.parametrize("kind", READS)
def test_a_read_that_keeps_others_waiting_for_too_long_is_ended(
    rig: Rig, clock: Clock, kind: str, what: str
) -> None:
    engine, trainer = start(rig, clock, max_read_seconds=7)
    read = begin_read(trainer, engine, kind)
    clock.now += 50  # alone, it may take longer
    waits: Future[Any] = engine.train_step(bare(1)) if what == "step" else engine.save(SaveRequest("zero"))
    arrived = clock.now
    trainer.parts_may_end.set()
    error = read.exception(WAIT)
    assert isinstance(error, Refused)
    assert (error.reason, error.metadata) == ("READ_TOO_LONG", {"max_read_seconds": "7"})
    assert "the limit (serve.max_read_seconds)" in error.message
    assert waits.result(WAIT).step == (what == "step")
    assert clock.now - arrived <= 7 + PART_SECONDS + STEP_SECONDS
    assert engine.status().device_share.ended_reads == 1


@pytest.mark.parametrize("kind", READS)
def test_a_session_is_opened_while_a_read_runs(rig: Rig, clock: Clock, kind: str) -> None:
    engine, trainer = start(rig, clock)
    read = begin_read(trainer, engine, kind)
    opened: Future[SessionAnswer] = engine.open_session(SessionRequest("client", "nonce"))
    began = clock.now
    trainer.ready = lambda: clock.now == began or opened.done()  # the first part ends, and no other
    trainer.parts_may_end.set()
    assert opened.result(WAIT).epoch == 1
    trainer.ready = lambda: True
    assert read.exception(WAIT) is None


@pytest.mark.parametrize("kind", READS)
def test_a_read_whose_caller_has_left_ends_with_its_part(rig: Rig, clock: Clock, kind: str) -> None:
    engine, trainer = start(rig, clock)
    read = begin_read(trainer, engine, kind)
    began = clock.now
    assert read.cancel()
    trainer.parts_may_end.set()
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    assert clock.now - began == PART_SECONDS + STEP_SECONDS


def test_reads_follow_one_another_while_nothing_trains(rig: Rig, clock: Clock) -> None:
    Slow.parts = 100
    engine, trainer = start(rig, clock, max_read_seconds=7)
    assert engine.train_step(bare(0)).result(WAIT).step == 1
    reads = [engine.eval_loss(evaluation()) for _ in range(3)]
    assert [read.result(WAIT).step for read in reads] == [1, 1, 1]
    assert [what for what, *_ in trainer.used] == ["step", "read", "read", "read"]


def test_steps_saves_and_reads_take_turns_and_each_keep_their_order(rig: Rig, clock: Clock) -> None:
    Slow.parts = 3
    engine, trainer = start(rig, clock)
    trainer.parts_may_end.clear()
    reads = [engine.eval_loss(evaluation()) for _ in range(3)]
    assert trainer.part_begins.acquire(timeout=WAIT)
    steps = [engine.train_step(bare(seed)) for seed in range(5)]
    save = engine.save(SaveRequest("five"))
    steps += [engine.train_step(bare(seed)) for seed in range(5, 12)]  # six seconds in all
    trainer.parts_may_end.set()
    assert [step.result(WAIT).step for step in steps] == list(range(1, 13))
    assert [read.result(WAIT).step for read in reads] == [0, 6, 12]
    assert save.result(WAIT).step == 5


def test_readers_cannot_fill_the_queue_against_steps(rig: Rig, clock: Clock) -> None:
    Slow.parts = 1
    engine, trainer = start(rig, clock, queue_limit=3)
    trainer.parts_may_end.clear()
    reads = [engine.eval_loss(evaluation())]
    assert trainer.part_begins.acquire(timeout=WAIT)
    reads += [engine.eval_loss(evaluation()) for _ in range(3)]
    assert reason(engine.eval_loss(evaluation())) == "QUEUE_FULL"
    steps = [engine.train_step(bare(seed)) for seed in range(3)]
    assert reason(engine.train_step(bare(9))) == "QUEUE_FULL", "as many steps as ever"
    share = engine.status().device_share
    assert (share.waiting_reads, share.refused_reads) == (3, 1)
    trainer.parts_may_end.set()
    assert sorted(step.result(WAIT).step for step in steps) == [1, 2, 3]
    clock.now += IDLE_SECONDS
    assert len([read.result(WAIT) for read in reads]) == 4


def test_the_reads_of_one_credential_that_wait_are_limited(rig: Rig, clock: Clock) -> None:
    Slow.parts = 1
    engine, trainer = start(rig, clock, max_reads_per_credential=2)
    trainer.parts_may_end.clear()
    running = engine.eval_loss(evaluation("a"))
    assert trainer.part_begins.acquire(timeout=WAIT)
    waiting = [engine.eval_loss(evaluation("a")), engine.generate(generation(1, "a")).future]
    assert reason(engine.eval_loss(evaluation("a"))) == "QUEUE_FULL"
    with pytest.raises(Refused, match=r"2 evaluations .* the limit \(serve.max_reads_per_credential\)"):
        list(engine.generate(generation(1, "a")))
    others = [engine.eval_loss(evaluation(credential)) for credential in ("b", "", "")]
    assert engine.status().device_share.refused_reads == 2
    assert waiting[0].cancel()  # its caller leaves
    waiting.append(engine.eval_loss(evaluation("a")))
    trainer.parts_may_end.set()
    for read in [running, *waiting[1:], *others]:
        read.result(WAIT)


def test_reads_whose_callers_have_left_take_no_place_from_steps(rig: Rig) -> None:
    engine = rig.start(serve={"queue_limit": 4})
    rig.trainer.gate.clear()
    first = engine.train_step(bare(1))
    rig.trainer.entered.acquire()
    for _ in range(6):  # one reader with a short deadline
        assert engine.eval_loss(evaluation("a")).cancel()
        generated = engine.generate(generation(1, "a"))
        status = engine.status()
        assert (status.queue_length, status.device_share.waiting_reads) == (1, 1), "not those that have left"
        generated.cancel()
        assert engine.status().queue_length == 0
        assert len(engine._run.queue._entries) <= 2, "the next one that comes drops those that have left"
    second = engine.train_step(bare(2))
    rig.trainer.gate.set()
    assert [each.result(WAIT).step for each in (first, second)] == [1, 2]


def test_a_save_waits_for_a_read_from_when_the_checkpoint_before_it_is_written() -> None:
    clock = Clock()
    share, queue = DeviceSharing(clock, 30.0), Queue(clock, gap_seconds=30.0)
    for requested in (None, clock.now):
        queue.park(Save(SaveRequest(), automatic=requested is None, arrived=requested))
    share.begin_read()
    clock.now += 100.0
    queue.unpark()
    assert queue.first_arrived is None, "no client waits for an automatic save"
    queue.unpark()
    assert not share.read_is_overdue(queue.first_arrived), "until now it waited for the other checkpoint"
    clock.now += 30.0
    assert share.read_is_overdue(queue.first_arrived)


def test_a_pause_between_steps_counts_as_theirs_and_a_client_that_has_left_is_not_waited_for() -> None:
    clock = Clock()
    share = DeviceSharing(clock, 30.0)

    def step(pause: float) -> None:
        clock.now += pause
        began = clock.now
        clock.now += 1.0
        share.end_step(began)

    step(0.0)
    assert share.seconds_until_read(step_waits=True) == 0.0, "nothing was read yet"
    share.begin_read()
    clock.now += 20.0
    share.end_read()
    assert share.seconds_until_read(step_waits=True) > 0
    step(0.0)
    step(2.0)
    assert share.owed_seconds == pytest.approx(20 - 4)
    assert share.seconds_until_read(step_waits=False) == IDLE_SECONDS
    clock.now += IDLE_SECONDS
    assert share.seconds_until_read(step_waits=False) == 0.0, "the client has left"
    step(0.0)  # or not
    assert share.owed_seconds == pytest.approx(20 - 4 - 1), "so long a pause is nobody's"
    for _ in range(20):
        step(0.0)
    assert share.owed_seconds == 0.0
    assert (share.step_seconds, share.read_seconds) == (24.0, 20.0)
