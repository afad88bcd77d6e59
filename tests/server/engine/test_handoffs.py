"""How often a step changes threads, counted from a trace of every call that handles it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any

from rig import WAIT, Rig, bare, open_session, payload

from maskwire_server.engine.commits import StepCommit
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.entries import Step
from maskwire_server.requests import StepRequest
from maskwire_server.results import StepAnswer
from maskwire_server.rpc import encoding

HANDLED = StepRequest | Step | StepCommit | StepAnswer
"""A step in each of its forms."""
LOOK_UPS = {"Journal.step", "Journal.step_of_request"}
EXECUTOR, COMMITTER = "maskwire-executor", "maskwire-committer"
Call = tuple[str, str]  # thread, function


@contextmanager
def traced(calls: list[Call]) -> Iterator[None]:
    """Record each call in the server that takes a step, in any of its forms, as an argument."""

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or "maskwire_server" not in frame.f_code.co_filename:
            return
        values = frame.f_locals
        arguments = [values.get(name) for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]]
        name = frame.f_code.co_qualname
        if name in LOOK_UPS or any(isinstance(value, HANDLED) for value in arguments):
            calls.append((threading.current_thread().name, name))

    threading.setprofile(record)  # for the threads of the engine, which start within
    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def handoffs(rig: Rig, make: Callable[[Engine], StepRequest]) -> list[tuple[str, str]]:
    """From which thread to which a step goes; the test's own thread stands for the gRPC worker."""
    calls: list[Call] = []
    with traced(calls):
        engine = rig.start()
        request = make(engine)
        calls.clear()
        reply = encoding.step(engine.train_step(request).result(WAIT))
    assert reply.step == 1
    functions = {function for _, function in calls}
    assert {"StepAdmission.admit", "Executor._train", "StepCommit.write", "StepCommit.committed"} <= functions
    caller = threading.current_thread().name
    threads = ["worker" if thread == caller else thread for thread, _ in calls]
    return [(one, other) for one, other in pairwise(threads) if one != other]


ONE_WAY = [("worker", EXECUTOR), (EXECUTOR, COMMITTER), (COMMITTER, "worker")]


def test_a_step_changes_threads_three_times(rig: Rig) -> None:
    assert handoffs(rig, lambda _: bare(1)) == ONE_WAY


def test_a_step_of_a_session_changes_threads_three_times(rig: Rig) -> None:
    def in_session(engine: Engine) -> StepRequest:
        return StepRequest(payload(1), open_session(engine), 1, "first")

    assert handoffs(rig, in_session) == ONE_WAY


def test_a_request_id_without_a_step_is_looked_up_first(rig: Rig) -> None:
    look_up = [("worker", COMMITTER), (COMMITTER, "worker")]
    assert handoffs(rig, lambda _: bare(1, "first")) == look_up + ONE_WAY
