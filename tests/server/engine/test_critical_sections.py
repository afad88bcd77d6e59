"""What happens to the queue and to the writer's lease in one critical section of the run's mutex."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from counter import FAIL_ID
from rig import WAIT, Rig, open_session, payload, reason

from maskwire_server.engine import shared_state
from maskwire_server.engine.executor import Executor
from maskwire_server.engine.lease import Lease
from maskwire_server.engine.queue import Queue
from maskwire_server.requests import SessionRequest, StepRequest

GUARDED: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Queue, (
        "start", "pop", "push_step", "keep_early", "reserve_id", "settle", "push_ahead", "refuse_step",
        "refuse_behind", "mark_refused", "refuse_steps",
    )),
    (Lease, ("open", "opened", "touch")),
    (Executor, ("_refuse_invalid",)),
)  # fmt: skip
"""What may only be called by the holder of the mutex; the last checks whether a step was abandoned."""


class Mutex(threading._RLock):  # type: ignore[name-defined,misc]
    """A reentrant lock that counts how often it was taken by a thread that did not hold it."""

    sections = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        entering = not self._is_owned()
        acquired: bool = super().acquire(blocking, timeout)
        self.sections += acquired and entering
        return acquired

    __enter__ = acquire


class Calls:
    """The calls of the guarded methods, each with the critical section it came in; None outside of all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, int | None]] = []
        self._patch = monkeypatch

    def note(self, mutex: Any) -> None:
        """Note every call from now on."""
        for kind, names in GUARDED:
            for name in names:
                self._patch.setattr(kind, name, self._noting(name, getattr(kind, name), mutex))

    def _noting(self, name: str, method: Callable[..., Any], mutex: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.made.append((name, mutex.sections if mutex._is_owned() else None))
            return method(*arguments, **options)

        return call

    def sections(self, name: str) -> list[int | None]:
        """The section of each call of one method."""
        return [section for made, section in self.made if made == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(shared_state, "threading", SimpleNamespace(RLock=Mutex))
    return Calls(monkeypatch)


def test_popping_the_check_for_abandonment_and_numbering_are_one_critical_section(
    rig: Rig, calls: Calls
) -> None:
    engine = rig.start(serve={"gap_seconds": 600})
    calls.note(engine._run.mutex)
    session = open_session(engine, "old", "n1")

    def train(number: int, first: int | None = None) -> Any:
        return engine.train_step(StepRequest(payload(number, first), session, number, f"{number} {first}"))

    rig.trainer.gate.clear()
    running = train(1)
    assert rig.trainer.entered.acquire(timeout=WAIT)
    abandoned, second = train(3), train(2)
    assert abandoned.cancel()
    rig.trainer.gate.set()
    assert (running.result(WAIT).step, second.result(WAIT).step) == (1, 2)
    assert reason(train(3, FAIL_ID)) == "INTERNAL"
    assert train(3).result(WAIT).step == 3
    assert engine.open_session(SessionRequest("new", "n2", takeover=True)).result(WAIT).step == 3
    assert {name for name, _ in calls.made} == {name for _, names in GUARDED for name in names}
    assert [name for name, section in calls.made if section is None] == []
    numbered = calls.sections("start")
    assert len(numbered) == 4, "steps 1 to 3, and the one that failed"
    assert set(numbered) <= set(calls.sections("_refuse_invalid"))
    assert set(numbered) <= set(calls.sections("pop"))


def test_a_takeover_raises_the_epoch_and_refuses_the_queue_in_one_critical_section(
    rig: Rig, calls: Calls
) -> None:
    engine = rig.start()
    old = open_session(engine, "old", "n1")
    rig.trainer.gate.clear()
    running, waiting = (engine.train_step(StepRequest(payload(n), old, n)) for n in (1, 2))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    calls.note(engine._run.mutex)
    opening = engine.open_session(SessionRequest("new", "n2", takeover=True))
    assert reason(waiting) == "FENCED"
    assert calls.sections("open") == calls.sections("refuse_steps") == calls.sections("push_ahead")
    assert None not in calls.sections("open")
    assert len(calls.sections("open")) == 1
    rig.trainer.gate.set()
    assert (running.result(WAIT).step, opening.result(WAIT).epoch) == (1, 2)
