"""The events of a run, and the publisher that no subscriber can hold up."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from rig import WAIT, Rig, bare, wait_for

from maskwire.v1.values import Outcome, RunState
from maskwire_server.batch import Batch, Prompts
from maskwire_server.engine.aggregates import Aggregates
from maskwire_server.engine.event_publisher import Publisher
from maskwire_server.events import (
    CheckpointWritten,
    Committed,
    Evaluated,
    Event,
    Generated,
    LineageOpened,
    RecoveryPhase,
    StateChanged,
    StepCommitted,
)
from maskwire_server.requests import EvalRequest, GenerateRequest, RestoreRequest, SaveRequest
from maskwire_server.results import EvalOptions, GenerateOptions

ALL = frozenset(Event.__args__)


class Recorder:
    """Keeps what it receives."""

    def __init__(self, name: str = "recorder", kinds: Iterable[Any] = ALL) -> None:
        self.name = name
        self.kinds = frozenset(kinds)
        self.events: list[Event] = []
        self.closed = False
        self.idled = 0

    def receive(self, event: Event) -> None:
        self.events.append(event)

    def idle(self) -> bool:
        self.idled += 1
        return False

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Blocked(Recorder):
    def __init__(self) -> None:
        super().__init__("blocked")
        self.gate = threading.Event()

    def receive(self, event: Event) -> None:
        self.gate.wait(60)
        super().receive(event)


class Raising(Recorder):
    def receive(self, event: Event) -> None:
        raise OSError("no space left on device")


def state(number: int) -> StateChanged:
    return StateChanged(float(number), RunState.SERVING)


def test_a_blocked_and_a_failing_subscriber_cost_no_step_and_the_status_counts_what_they_lose(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    engine = rig.start()
    blocked, raising, healthy = Blocked(), Raising("raising"), Recorder()
    engine.events.subscribe(blocked, limit=4)
    engine.events.subscribe(raising)
    engine.events.subscribe(healthy)
    for seed in range(12):
        assert engine.train_step(bare(seed)).result(WAIT).step == seed + 1
    wait_for(lambda: len(healthy.of(StepCommitted)) == 12)
    published = len(healthy.events)
    wait_for(lambda: engine.status().figures.events_dropped["raising"] == published)
    dropped = engine.status().figures.events_dropped
    assert dropped == {"blocked": published - 5, "raising": published, "recorder": 0}, "4 wait, 1 is held"
    assert sum("raising failed" in record.message for record in caplog.records) == 1, "logged once"
    blocked.gate.set()
    engine.events.close()
    assert len(blocked.events) == 5
    assert healthy.closed


def test_a_step_is_published_with_what_its_answer_says_before_the_answer(rig: Rig) -> None:
    engine = rig.start()
    recorder = Recorder()
    engine.events.subscribe(recorder)
    answer = engine.train_step(bare(1, "the id")).result(WAIT)
    figures = engine.status().figures
    assert figures.steps == {Outcome.APPLIED: 1}, "the answer comes after the step was counted"
    wait_for(lambda: bool(recorder.of(StepCommitted)))
    (event,) = recorder.of(StepCommitted)
    assert (event.step, event.lineage, event.run_id) == (1, 1, engine.status().run_id)
    assert (event.losses, event.gradient_norm) == (answer.result.losses, answer.result.gradient_norm)
    times = event.queue_seconds, event.compute_seconds, event.commit_seconds
    assert times == (answer.queue_seconds, answer.compute_seconds, answer.commit_seconds)
    assert (event.request_id, event.tokens, event.learning_rate) == ("the id", 16, 1e-3)
    wait_for(lambda: bool(recorder.of(Committed)))
    assert figures.newest_step == event
    assert figures.tokens == 16
    assert figures.step_seconds["compute"].count == 1
    assert figures.step_seconds["compute"].total == answer.compute_seconds
    assert figures.recent.compute_seconds == answer.compute_seconds
    assert figures.commit_seconds is not None
    assert figures.commit_seconds.count >= 1


def test_states_recovery_checkpoints_restores_and_reads_are_published(rig: Rig) -> None:
    engine = rig.start()
    phases = engine.status().figures.recovery_seconds
    assert set(phases) == {"open", "build", "load", "replay", "warm_up", "save"}
    recorder = Recorder()
    engine.events.subscribe(recorder)
    engine.train_step(bare(1)).result(WAIT)
    saved = engine.save(SaveRequest("kept")).result(WAIT)
    wait_for(lambda: bool(recorder.of(CheckpointWritten)))
    (written,) = recorder.of(CheckpointWritten)
    assert (written.name, written.step, written.automatic) == ("kept", 1, False)
    assert written.size_bytes == saved.size_bytes > 0
    engine.train_step(bare(2)).result(WAIT)
    engine.restore(RestoreRequest("kept")).result(WAIT)
    wait_for(lambda: bool(recorder.of(LineageOpened)))
    (opened,) = recorder.of(LineageOpened)
    assert (opened.lineage, opened.step) == (2, 1)
    wait_for(lambda: len(recorder.of(StateChanged)) == 2)
    assert [event.state.name for event in recorder.of(StateChanged)] == ["RESTORING", "SERVING"]
    batch = Batch(np.full((2, 8), 11), 2, 8)
    answer = engine.eval_loss(EvalRequest(batch, EvalOptions((0, 1), draws=2))).result(WAIT)
    wait_for(lambda: bool(recorder.of(Evaluated)))
    (evaluated,) = recorder.of(Evaluated)
    assert (evaluated.step, evaluated.lineage, evaluated.draws) == (1, 2, 2)
    assert evaluated.nats_per_token == answer.result.nats_per_token
    prompts = Prompts(
        np.zeros((6, 4), np.int64), np.ones((6, 4), bool), np.zeros((6, 4), bool),
        np.array([4, 3, 4, 4, 4, 4], np.int32),
    )  # fmt: skip
    prompts.valid[1, 3] = False
    states = list(engine.generate(GenerateRequest(prompts, GenerateOptions(tuple(range(6))))))
    assert states[-1].state.done
    wait_for(lambda: bool(recorder.of(Generated)))
    (generated,) = recorder.of(Generated)
    assert (generated.rows, generated.passes, generated.step) == (6, 4, 1)
    assert [sample.tolist() for sample in generated.samples] == [
        [0, 1, 2, 3], [1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6],
    ]  # fmt: skip


def test_steps_that_a_start_computes_again_are_not_counted_again(rig: Rig) -> None:
    engine = rig.start(checkpoints={"every_seconds": "off"})
    for seed in range(3):
        engine.train_step(bare(seed)).result(WAIT)
    engine.close()
    again = rig.start()
    assert rig.trainer.trained == [(1, 1), (1, 2), (1, 3)]
    assert again.status().figures.steps == {}
    assert again.status().figures.recovery_seconds["replay"] > 0


def test_without_subscribers_there_is_no_thread_and_reads_make_no_event(rig: Rig) -> None:
    before = {thread.name for thread in threading.enumerate()}
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    assert not engine.events.wanted(Evaluated)
    assert {thread.name for thread in threading.enumerate()} - before == {
        "maskwire-executor", "maskwire-committer",
    }  # fmt: skip


def test_idle_is_called_again_while_something_is_buffered_and_an_error_in_it_is_not_a_lost_event() -> None:
    class Buffering(Recorder):
        def idle(self) -> bool:
            super().idle()
            if self.idled == 1:
                raise OSError("first")
            return self.idled == 2

    publisher, subscriber = Publisher(), Buffering()
    publisher.subscribe(subscriber)
    publisher.publish(state(1))
    wait_for(lambda: subscriber.idled == 1)
    publisher.publish(state(2))
    wait_for(lambda: subscriber.idled == 3)
    publisher.close()
    assert (len(subscriber.events), publisher.dropped, subscriber.closed) == (2, {"recorder": 0}, True)


def test_a_subscriber_gets_only_the_kinds_that_it_wants() -> None:
    publisher, some = Publisher(), Recorder(kinds={RecoveryPhase})
    publisher.subscribe(some)
    publisher.publish(state(1))
    publisher.publish(RecoveryPhase(0.0, "load", 1.0))
    publisher.close()
    assert some.events == [RecoveryPhase(0.0, "load", 1.0)]


def test_histograms_count_a_value_in_the_first_bucket_that_includes_it() -> None:
    aggregates = Aggregates(lambda: 0.0)
    for seconds in (0.0, 0.0001, 0.0002, 1.0, 1e9):
        aggregates.add(Committed(0.0, seconds, 1))
    found = aggregates.figures({}).commit_seconds
    assert found is not None
    counts = dict(zip((*found.bounds, "above"), found.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {
        0.0001: 2, 0.00025: 1, 1.0: 1, "above": 1,
    }  # fmt: skip
    assert found.total == pytest.approx(1e9 + 1.0003)
