"""How often a step changes threads, counted from a trace of every call that handles it.

The call comes to the service as gRPC brings it; the test's own thread stands for the gRPC worker.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import FrameType, MethodType
from typing import Any

from rig import Rig, open_session, wait_for

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.batch import Batch, Payload
from maskwire_server.engine.commits import StepCommit
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.entries import Step
from maskwire_server.journal.records import StepRecord
from maskwire_server.requests import StepRequest
from maskwire_server.results import StepAnswer, StepResult
from maskwire_server.rpc.service import TrainingService

FORMS = (
    pb.TrainStepRequest | StepRequest | Payload | Batch | Step | StepResult | StepRecord | StepCommit
    | StepAnswer | pb.TrainStepResponse
)  # fmt: skip
"""A step in each of its forms; the futures of its callers belong to them."""
LOOK_UPS = {"journal.Journal.step", "journal.Journal.step_of_request"}
WORKER, EXECUTOR, COMMITTER = "worker", "maskwire-executor", "maskwire-committer"
STAGES = {
    "service.TrainingService.TrainStep": WORKER,
    "admission.StepAdmission.admit": WORKER,
    "counter.CounterTrainer.train_step": EXECUTOR,
    "commits.StepCommit.write": COMMITTER,
    "commits.StepCommit.committed": COMMITTER,
    "_base.Future.set_result": COMMITTER,
    "encoding.step": WORKER,
}
"""The thread of each stage. A thread that began before the trace leaves none: then its stage is missing."""
ENDS_FIRST = {
    **dict.fromkeys((*LOOK_UPS, "counter.CounterTrainer.train_step"), WORKER),
    "commits.StepCommit.write": EXECUTOR,
}
"""Each of these functions starts only when the thread that passed the step on to it waits again."""


class Trace:
    """The visits of threads to a step: each from the first call that handles it to the thread's next wait.

    What a thread still does with a step that it has passed on belongs to its visit, whatever the next thread
    does meanwhile. So the order of the visits is the same in every run. A thread that waits in the middle of
    its work with a step, for a pool for instance, visits it twice.
    """

    def __init__(self) -> None:
        self.visits: list[int] = []
        self.functions: dict[str, set[str]] = {}
        """The threads that called each function."""
        self.on = False
        self._futures: set[Future[Any]] = set()
        self._waiting: dict[int, bool] = {}
        self._names = {threading.get_ident(): WORKER}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the calls of this thread, and of all that start within."""
        threading.setprofile(self._record)
        sys.setprofile(self._record)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def handoffs(self) -> list[tuple[str, str]]:
        """Each change of thread: from which, and to which."""
        return list(pairwise(self._names[thread] for thread in self.visits))

    def _record(self, frame: FrameType, event: str, called: Any) -> None:
        thread = threading.get_ident()
        if event == "c_call" and called.__name__ == "acquire" and frame.f_code.co_name != "_is_owned":
            lock = called.__self__
            if isinstance(lock, type(threading.Lock())) and lock.locked():  # `_is_owned` only tries
                self._waiting[thread] = True
        if not self.on or event != "call" or frame.f_code.co_filename == __file__:
            return
        module: str = frame.f_globals.get("__name__", "")
        function = f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname}"
        if function not in LOOK_UPS and not self._holds(list(frame.f_locals.values())):
            return
        name = self._names.setdefault(thread, threading.current_thread().name)
        self.functions.setdefault(function, set()).add(name)
        if self._waiting.get(thread, True):
            self.visits.append(thread)
        self._waiting[thread] = False
        if function in ENDS_FIRST:
            wait_for(lambda: self._waits(ENDS_FIRST[function]))

    def _waits(self, name: str) -> bool:
        return all(self._waiting.get(thread) for thread, known in self._names.copy().items() if known == name)

    def _holds(self, value: Any, depth: int = 3) -> bool:
        """Whether a value is the step in one of its forms, or one of its futures, or has it within."""
        if isinstance(value, Step):
            self._futures.update(getattr(value, "waiters", ()))  # none while it is being made
        if isinstance(value, FORMS):
            return True
        if isinstance(value, Future) and value in self._futures:
            return True
        within: list[Any] = []
        if isinstance(value, list | tuple | set | frozenset):
            within = list(value)
        elif isinstance(value, dict):
            within = list(value.values())
        elif isinstance(value, partial):
            within = [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            within = [value.__self__]
        elif type(value).__module__ == "concurrent.futures.thread":  # what waits in a pool's queue
            within = [getattr(value, name, None) for name in ("fn", "args", "kwargs")]
        return depth > 0 and any(self._holds(each, depth - 1) for each in within)


class Context:
    """A call whose client stays."""

    def add_callback(self, _: Callable[[], None]) -> bool:
        return True


def step(**fields: Any) -> pb.TrainStepRequest:
    batch = pb.TokenBatch(data=bytes(range(10, 18)), shape=[2, 4], dtype=pb.DATA_TYPE_UINT8)
    return pb.TrainStepRequest(batch=batch, **fields)


def handoffs(rig: Rig, make: Callable[[Engine], pb.TrainStepRequest]) -> list[tuple[str, str]]:
    """Each change of thread of one step: from which, and to which."""
    trace = Trace()
    with trace.recorded():
        engine = rig.start()
        service, request = TrainingService(engine), make(engine)
        trace.on = True
        reply = service.TrainStep(request, Context())  # type: ignore[arg-type]
        trace.on = False
    assert reply.step == 1
    assert {stage: trace.functions.get(stage) for stage in STAGES} == {
        stage: {thread} for stage, thread in STAGES.items()
    }
    return trace.handoffs()


ONE_WAY = [(WORKER, EXECUTOR), (EXECUTOR, COMMITTER), (COMMITTER, WORKER)]


def in_session(engine: Engine) -> pb.TrainStepRequest:
    session = open_session(engine)
    reference = pb.SessionRef(run_id=session.run_id, lineage=session.lineage, epoch=session.epoch)
    return step(session=reference, step=1, request_id="first")


def test_a_step_changes_threads_three_times(rig: Rig) -> None:
    assert handoffs(rig, lambda _: step()) == ONE_WAY


def test_a_step_of_a_session_changes_threads_three_times(rig: Rig) -> None:
    assert handoffs(rig, in_session) == ONE_WAY


def test_a_request_id_without_a_step_is_looked_up_first(rig: Rig) -> None:
    look_up = [(WORKER, COMMITTER), (COMMITTER, WORKER)]
    assert handoffs(rig, lambda _: step(request_id="first")) == look_up + ONE_WAY
