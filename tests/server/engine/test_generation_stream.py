"""A generation in the engine: what it saw, its place in the line, and a reader that is slow or goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counter import CounterTrainer
from rig import make_engine

from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload, Prompts
from maskwire_server.engine import generation_stream as module
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused
from maskwire_server.requests import GenerateRequest, StepRequest
from maskwire_server.results import GenerateOptions, GenerationState

WAIT = 20
LONG = 300  # passes


class Stepped(CounterTrainer):
    """Makes a pass when it is allowed one."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        states = super().generate(prompts, options, wanted)
        while True:
            assert self.allowed.acquire(timeout=WAIT)
            try:
                yield next(states)
            except StopIteration:
                return


class Failing(CounterTrainer):
    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        yield next(super().generate(prompts, options, wanted))
        raise RuntimeError("the secret of the failing generation")


Start = Callable[..., tuple[Engine, Any]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def begin(kind: type[CounterTrainer] = CounterTrainer, **serve: Any) -> tuple[Engine, Any]:
        whole = config.load(None, serve=serve)
        built: list[CounterTrainer] = []

        def build() -> CounterTrainer:
            built.append(kind())
            return built[0]

        engine = make_engine(tmp_path, whole, build)
        engines.append(engine)
        engine.wait_serving(WAIT)
        return engine, built[0]

    yield begin
    for engine in engines:
        engine.close()


def wanted(length: int = 4, *, rows: int = 2, every_step: bool = True) -> GenerateRequest:
    options = GenerateOptions(tuple(range(rows)))
    return GenerateRequest(Prompts.nothing(rows, length), options, every_step=every_step)


def train(engine: Engine, first: int = 1) -> Any:
    return engine.train_step(StepRequest(Payload(Batch(np.full((2, 4), first), 2, 4), Modes())))


def test_every_answer_names_the_durable_step_that_was_seen(start: Start) -> None:
    engine, _ = start()
    future = train(engine)
    seen = engine.generate(wanted())
    later = train(engine)
    answers = list(seen)
    step = future.result(WAIT)
    assert [(answer.step, answer.digest) for answer in answers] == [(1, step.digest)] * 4
    assert engine.status().durable_step >= 1
    assert later.result(WAIT).step == 2
    assert [answer.state.unmasking_step for answer in answers] == [1, 2, 3, 4]
    assert [answer.state.done for answer in answers] == [False, False, False, True]


def test_without_every_step_only_the_last_is_answered(start: Start) -> None:
    engine, _ = start()
    (only,) = engine.generate(wanted(every_step=False))
    assert only.state.done
    assert only.state.unmasking_step == 4


def test_a_cancelled_generation_frees_the_device_within_one_pass(start: Start) -> None:
    engine, trainer = start(Stepped)
    running = engine.generate(wanted(LONG))
    answers = iter(running)
    trainer.allowed.release(3)
    assert [next(answers).state.unmasking_step for _ in range(3)] == [1, 2, 3]
    waiting = train(engine)
    running.cancel()
    trainer.allowed.release()
    assert waiting.result(WAIT).step == 1
    assert trainer.passes == 3, "no pass begins after the cancellation"
    with pytest.raises(CancelledError):
        next(answers)


def test_one_that_is_cancelled_in_the_line_makes_no_pass(start: Start) -> None:
    engine, trainer = start()
    trainer.gate.clear()
    busy = train(engine)
    for _ in range(3):
        engine.generate(wanted(LONG)).cancel()
    trainer.gate.set()
    assert busy.result(WAIT).step == 1
    assert train(engine).result(WAIT).step == 2
    assert trainer.passes == 0


def test_a_reader_that_does_not_read_bounds_what_is_kept_and_gets_the_last(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PENDING_BYTES", 10 * 2 * LONG * 2)  # 10 states of 2 rows of uint16
    engine, trainer = start()
    unread = engine.generate(wanted(LONG))
    assert train(engine).result(WAIT).step == 1, "the device does not wait for the reader"
    assert trainer.passes == LONG
    passes = [answer.state.unmasking_step for answer in unread]
    assert passes == list(range(LONG - 9, LONG + 1))


def test_draining_ends_a_generation_that_runs_and_those_that_wait(start: Start) -> None:
    engine, trainer = start(Stepped)
    generations = [engine.generate(wanted(LONG)) for _ in range(4)]
    trainer.allowed.release()
    answers = iter(generations[0])
    assert next(answers).state.unmasking_step == 1
    done = threading.Thread(target=engine.drain, args=(WAIT,))
    done.start()
    while engine.status().state.name != "DRAINING":
        time.sleep(0.005)
    trainer.allowed.release()
    for generation in (answers, *generations[1:]):
        with pytest.raises(Refused) as raised:
            list(generation)
        assert raised.value.reason == "DRAINING"
    done.join(WAIT)
    assert trainer.passes <= 2, "at most the pass that was under way"


def test_a_failure_has_an_id_and_tells_nothing_else(start: Start) -> None:
    engine, _ = start(Failing)
    with pytest.raises(Refused, match="error") as raised:
        list(engine.generate(wanted()))
    assert raised.value.reason == "INTERNAL"
    assert "secret" not in str(raised.value)
    assert train(engine).result(WAIT).step == 1


def test_a_full_line_takes_no_generation(start: Start) -> None:
    engine, trainer = start(queue_limit=2)
    trainer.gate.clear()
    held = [train(engine)]
    assert trainer.entered.acquire(timeout=20)
    held += [train(engine) for _ in range(2)]
    with pytest.raises(Refused) as raised:
        list(engine.generate(wanted()))
    assert raised.value.reason == "QUEUE_FULL"
    trainer.gate.set()
    assert [future.result(WAIT).step for future in held] == [1, 2, 3]
