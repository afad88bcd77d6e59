"""An error that the device does not come back from ends the process; others refuse one request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from counter import CounterTrainer
from rig import WAIT, Rig, bare, payload, wait_for

from maskwire_server.batch import Modes, Payload, Prompts
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import DeviceLost, Refused
from maskwire_server.requests import EvalRequest, GenerateRequest, RestoreRequest, SaveRequest, StepRequest
from maskwire_server.results import EvalOptions, GenerateOptions

LOST = "CUDA error: an illegal memory access was encountered\nfor debugging pass CUDA_LAUNCH_BLOCKING=1"


class Failing(CounterTrainer):
    """Fails in one method with `error`, once it is told to."""

    method = ""
    error: Exception = RuntimeError(LOST)

    def usable_after(self, error: BaseException) -> bool:
        return "CUDA error" not in str(error)

    def fail(self, method: str) -> None:
        if method == self.method:
            raise self.error

    def train_step(self, *arguments: Any) -> Any:
        self.fail("train_step")
        return super().train_step(*arguments)

    def eval_loss(self, *arguments: Any) -> Any:
        self.fail("eval_loss")
        return super().eval_loss(*arguments)

    def generate(self, *arguments: Any) -> Iterator[Any]:
        self.fail("generate")
        yield from super().generate(*arguments)

    def snapshot(self) -> Any:
        self.fail("snapshot")
        return super().snapshot()

    def load(self, folder: Any) -> None:
        self.fail("load")
        super().load(folder)


def evaluate(engine: Engine) -> object:
    options = EvalOptions(row_ids=(0, 1))
    return engine.eval_loss(EvalRequest(payload(1).batch, options)).result(WAIT)


def generate(engine: Engine) -> object:
    return list(engine.generate(GenerateRequest(Prompts.nothing(1, 4), GenerateOptions((1,), 4))))


JOBS: dict[str, Callable[[Engine], object]] = {
    "train_step": lambda engine: engine.train_step(bare(7)).result(WAIT),
    "eval_loss": evaluate,
    "generate": generate,
    "snapshot": lambda engine: engine.save(SaveRequest("copy")).result(WAIT),
    "load": lambda engine: engine.restore(RestoreRequest("one")).result(WAIT),
}


@pytest.mark.parametrize("method", JOBS)
def test_an_error_that_the_device_does_not_come_back_from_ends_the_process(
    rig: Rig, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = rig.start(Failing)
    trained = engine.train_step(bare(0, "first")).result(WAIT)
    engine.save(SaveRequest("one")).result(WAIT)
    trainer = rig.trainer
    assert isinstance(trainer, Failing)
    trainer.method = method
    with caplog.at_level(logging.CRITICAL), pytest.raises(Refused) as refused:
        JOBS[method](engine)
    assert refused.value.reason == "DRAINING", "unavailable: whether it was done is not known, ask again"
    wait_for(lambda: bool(rig.fatal))
    assert [type(error) for error in rig.fatal] == [DeviceLost]
    lines = [record.getMessage() for record in caplog.records if "the device has failed" in record.message]
    assert lines[0].endswith("the server exits; restart it to recover the run")
    assert "illegal memory access" in lines[0]
    engine.close()
    again = rig.start()
    assert again.status().durable_step == 1
    assert again.train_step(bare(0, "first")).result(WAIT).digest == trained.digest


@pytest.mark.parametrize("method", ["train_step", "eval_loss", "generate", "snapshot"])
def test_an_error_that_leaves_the_device_as_it_was_refuses_one_request(rig: Rig, method: str) -> None:
    engine = rig.start(Failing)
    trainer = rig.trainer
    assert isinstance(trainer, Failing)
    trainer.error = ValueError("a bad batch")
    trainer.method = method
    with pytest.raises(Refused) as refused:
        JOBS[method](engine)
    assert refused.value.reason == "INTERNAL"
    trainer.method = ""
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    assert rig.fatal == []


def test_the_next_step_is_prepared_while_the_current_one_is_computed(rig: Rig) -> None:
    engine = rig.start()
    trainer = rig.trainer
    payloads = [Payload(payload(n).batch, Modes(learning_rate=0.1 * n)) for n in range(3)]
    trainer.gate.clear()
    answers = [engine.train_step(StepRequest(each)) for each in payloads]
    trainer.gate.set()
    assert [each.result(WAIT).step for each in answers] == [1, 2, 3]
    assert [(lineage, step) for lineage, step, _, _ in trainer.prepared] == [(1, 2), (1, 3)]
    for (_, _, batch, modes), expected in zip(trainer.prepared, payloads[1:], strict=True):
        assert batch is expected.batch
        assert modes == expected.modes
    engine.train_step(bare(4)).result(WAIT)
    assert len(trainer.prepared) == 2, "a step that comes alone waits for no preparation"


def test_an_error_while_the_next_step_is_prepared_changes_nothing(rig: Rig) -> None:
    class Unprepared(CounterTrainer):
        def prepare_step(self, *arguments: Any) -> None:
            super().prepare_step(*arguments)
            raise MemoryError("no room for two batches")

    engine = rig.start(Unprepared)
    assert prepared_of(engine, rig, [bare(1), bare(2)]) == 1
    assert rig.fatal == []


def prepared_of(engine: Engine, rig: Rig, requests: list[StepRequest], cancelled: int | None = None) -> int:
    """The number of steps prepared ahead when the requests are in the queue together."""
    rig.trainer.gate.clear()
    answers = [engine.train_step(each) for each in requests]
    assert rig.trainer.entered.acquire(timeout=WAIT)
    if cancelled is not None:
        answers.pop(cancelled).cancel()
    rig.trainer.gate.set()
    assert [each.result(WAIT).step for each in answers] == list(range(1, len(answers) + 1))
    return len(rig.trainer.prepared)


def test_a_step_that_its_client_has_given_up_is_not_prepared(rig: Rig) -> None:
    assert prepared_of(rig.start(), rig, [bare(1), bare(2)], cancelled=1) == 0


def test_with_a_quarantine_nothing_is_prepared_ahead(rig: Rig) -> None:
    """A crash in the preparation would count against the batch of the step before."""
    assert prepared_of(rig.start(serve={"poison_after": 2}), rig, [bare(1), bare(2)]) == 0


def test_a_step_behind_a_save_is_not_prepared(rig: Rig) -> None:
    engine = rig.start()
    trainer = rig.trainer
    trainer.gate.clear()
    first = engine.train_step(bare(1))
    saved = engine.save(SaveRequest("between"))
    second = engine.train_step(bare(2))
    trainer.gate.set()
    assert [first.result(WAIT).step, second.result(WAIT).step] == [1, 2]
    saved.result(WAIT)
    assert trainer.prepared == []
