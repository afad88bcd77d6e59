"""How the blocking client drives its calls: on which thread, whom it wakes, and what Ctrl-C leaves."""

from __future__ import annotations

import asyncio
import dis
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from scripted_server import TOKENS, Script, connect, refuse

import maskwire
import maskwire.aio
from maskwire.driver import result_of
from maskwire.errors import InvalidRequestError, MaskwireError, UnavailableError
from maskwire.protocol.pending_step import PendingStep

SOURCES = str(Path(maskwire.__file__).parent)


def test_a_blocking_step_is_sent_from_its_callers_thread(script: Script) -> None:
    senders: list[int] = []
    with connect(script) as trainer:
        stubs: list[Any] = [trainer._stub]
        other = threading.Thread(target=lambda: stubs.append(trainer._stub))
        other.start()
        other.join()
        assert stubs[0] is not stubs[1], "the main thread has a channel of its own"
        for stub in stubs:

            def record(*arguments: Any, send: Any = stub.TrainStep, **options: Any) -> Any:
                senders.append(threading.get_ident())
                return send(*arguments, **options)

            stub.TrainStep = record
        trainer.train_step(TOKENS)
        assert senders == [threading.get_ident()]
        trainer.submit(TOKENS).result(timeout=20)
        assert senders[1] != threading.get_ident()


def test_only_the_thread_whose_condition_holds_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    holds = [False, False]
    woken: list[object] = []
    acted: list[int] = []

    class Recorded(queue.SimpleQueue[None]):
        def put(self, *arguments: Any, **options: Any) -> None:
            woken.append(self)
            super().put(*arguments, **options)

    with maskwire.attach("127.0.0.1:1") as client:
        monkeypatch.setattr(queue, "SimpleQueue", Recorded)

        def wait(index: int) -> None:
            client._when(lambda: holds[index], lambda: acted.append(index))

        threads = [threading.Thread(target=wait, args=(index,)) for index in range(2)]
        for index, thread in enumerate(threads):
            thread.start()
            while len(client._waiting) <= index:
                pass
        waiters = list(client._waiting)
        for index in (1, 0):
            with client._lock:
                holds[index] = True
                client._wake()
            threads[index].join()
        assert acted == [1, 0]
        assert woken == [waiters[1], waiters[0]]


def test_closing_ends_a_wait_whose_condition_never_holds() -> None:
    client = maskwire.attach("127.0.0.1:1")
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            client._when(lambda: False, lambda: None)
        except UnavailableError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while not client._waiting:
        time.sleep(0.001)
    client.close()
    waiting.join(20)
    assert [error.reason for error in raised] == ["CANCELLED"]
    assert not client._waiting


@pytest.mark.parametrize("error", [None, ValueError("bad batch")])
def test_the_wait_for_a_future_holds_no_condition_that_an_interrupt_could_leave_locked(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    future: Future[int] = Future()
    waiting: queue.SimpleQueue[None] = queue.SimpleQueue()

    def finish() -> None:
        waiting.get()
        future.set_result(7) if error is None else future.set_exception(error)

    def add_done_callback(function: Any, add: Any = future.add_done_callback) -> None:
        add(function)
        waiting.put(None)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError):
        result_of(future, 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(future, "add_done_callback", add_done_callback)
        patch.setattr(threading.Condition, "wait", lambda *_: pytest.fail("it waits on a Condition"))
        if error is None:
            assert result_of(future) == result_of(future, 0.0) == 7
        else:
            with pytest.raises(ValueError, match="bad batch"):
                result_of(future)
    thread.join()


def answer_after_the_hash(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server answer only once the client has hashed the payload."""
    hashed = threading.Event()
    compute = PendingStep.payload_hash

    def payload_hash(self: PendingStep) -> bytes:
        found = compute(self)
        hashed.set()
        return found

    def wait(request: Any, context: Any) -> None:
        assert hashed.wait(20), "the client hashes only once it has the answer"

    monkeypatch.setattr(PendingStep, "payload_hash", payload_hash)
    script.before = [wait]


@pytest.mark.parametrize("call", ["train_step", "submit"])
def test_the_payload_is_hashed_while_the_request_is_on_its_way(
    script: Script, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    answer_after_the_hash(script, monkeypatch)
    with connect(script) as trainer:
        if call == "train_step":
            assert trainer.train_step(TOKENS).step == 1
        else:
            assert trainer.submit(TOKENS).result(timeout=30).step == 1


def test_the_asyncio_client_hashes_while_the_request_is_on_its_way(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_after_the_hash(script, monkeypatch)

    async def main() -> None:
        async with await maskwire.aio.connect(script.target) as trainer:  # type: ignore[attr-defined]
            assert (await trainer.train_step(TOKENS)).step == 1

    asyncio.run(main())


class Interrupt:
    """Raises KeyboardInterrupt at the nth place where CPython could deliver a signal to the client's code.

    CPython checks for signals when a function begins, after a call and at the end of a loop's body.
    """

    CHECKED = frozenset({"RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"})

    def __init__(self, number: int) -> None:
        self.left = number
        self.last: dict[Any, str] = {}
        self.before = sys.gettrace()

    def __enter__(self) -> Interrupt:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: Any, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            checked = self.last.get(frame) in self.CHECKED
            self.last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            self.left -= checked
            if checked and self.left == 0:
                sys.settrace(self.before)
                raise KeyboardInterrupt
        return self.trace


def test_an_interrupt_anywhere_in_a_step_leaves_the_trainer_in_order(script: Script) -> None:
    interrupted = 0
    with connect(script) as trainer:
        for place in range(1, 1000):
            try:
                with Interrupt(place) as interrupt:
                    trainer.train_step(TOKENS)
            except KeyboardInterrupt:
                interrupted += 1
            trainer.settle()
            assert (trainer.step, trainer.digest) == (script.step, script.digest), f"place {place}"
            assert trainer.train_step(TOKENS).step == script.step, f"place {place}"
            if interrupt.left > 0:
                break
        else:
            pytest.fail("a step has more places than are tried")
    assert interrupted > 50, "the places of a step were interrupted"


def refused_behind(released: threading.Event) -> list[Any]:
    """The first step is refused once `released` is set."""

    def bad(_: Any, context: Any) -> None:
        assert released.wait(20)
        refuse(context, "INVALID_ARGUMENT", "INVALID_FIELD")

    return [bad]


def test_an_interrupted_step_is_repeated_under_its_number_though_another_is_its_own_by_now(
    script: Script,
) -> None:
    refused, answered = threading.Event(), threading.Event()
    script.before = [*refused_behind(refused), lambda *_: answered.wait(20)]
    with connect(script) as trainer:
        first = trainer.submit(TOKENS)
        while not script.requests:
            time.sleep(0.001)
        sent = []

        def interrupted(request: Any, send: Any = trainer._stub.TrainStep, **options: Any) -> Any:
            sent.append(send.future(request, **options))
            refused.set()
            with pytest.raises(InvalidRequestError):
                first.result(timeout=20)
            while len(script.requests) < 2:  # it has reached the server as step 2
                time.sleep(0.001)
            raise KeyboardInterrupt

        trainer._stub.TrainStep = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.train_step(TOKENS)
        answered.set()
        trainer.settle()
        assert [request.step for request in script.requests] == [1, 2, 2, 1]
        assert len({request.request_id for request in script.requests[1:]}) == 1
        assert (trainer.step, script.step) == (1, 1)
        assert trainer.train_step(TOKENS).step == 2


def test_closing_ends_the_wait_of_a_step_that_was_not_sent(script: Script) -> None:
    refused, answered = threading.Event(), threading.Event()
    script.before = [*refused_behind(refused), lambda *_: answered.wait(20)]
    with connect(script) as trainer:
        first = trainer.submit(TOKENS)
        refused.set()
        with pytest.raises(InvalidRequestError):
            first.result(timeout=20)
        held = trainer.submit(TOKENS)
        raised: list[BaseException] = []

        def wait_behind() -> None:
            try:
                trainer.train_step(TOKENS)
            except MaskwireError as error:
                raised.append(error)

        behind = threading.Thread(target=wait_behind)
        behind.start()
        while trainer._writer.in_flight < 2:
            time.sleep(0.001)
        trainer.close(grace=0)
        behind.join(20)
        assert ["closed" in str(error) for error in raised] == [True]
        with pytest.raises(UnavailableError):
            held.result(timeout=20)
        answered.set()


def test_closing_the_asyncio_client_ends_every_wait_with_an_error(script: Script) -> None:
    refused, answered = threading.Event(), threading.Event()
    refused.set()
    script.before = [*refused_behind(refused), lambda *_: answered.wait(20)]

    async def main() -> None:
        trainer = await maskwire.aio.connect(script.target)  # type: ignore[attr-defined]
        with pytest.raises(InvalidRequestError):
            await trainer.train_step(TOKENS)
        held = await trainer.submit(TOKENS)
        behind = asyncio.create_task(trainer.train_step(TOKENS))
        while trainer._writer.in_flight < 2:
            await asyncio.sleep(0)
        await trainer.close(grace=0.01)
        for each in (held, behind):
            with pytest.raises(UnavailableError, match="the client was closed"):
                await asyncio.wait_for(each, 20)

    asyncio.run(main())
    answered.set()


INTERRUPTED = """
import random, signal, sys, time, maskwire

class Interrupted(BaseException):
    pass

armed = False

def handler(*_):
    global armed
    if armed:
        armed = False
        raise Interrupted

signal.signal(signal.SIGALRM, handler)
random.seed(int(sys.argv[2]))
interrupts = 0
with maskwire.connect(sys.argv[1], on_wait=lambda _: None) as trainer:
    for _ in range(20):
        trainer.train_step([[1, 2, 3, 4]])
    began = time.monotonic()
    for _ in range(50):
        trainer.train_step([[1, 2, 3, 4]])
    step_seconds = (time.monotonic() - began) / 50
    for _ in range(200):
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, step_seconds))
            trainer.train_step([[1, 2, 3, 4]])
            armed = False
        except Interrupted:
            interrupts += 1
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        trainer.settle()
    print(interrupts, trainer.step)
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_signals_at_random_moments_of_a_step_leave_the_connection_usable(script: Script, seed: int) -> None:
    """A lock of gRPC that an interrupted call keeps would block every later call, and the process's end."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, script.target, str(seed)],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    interrupts, step = map(int, done.stdout.split())
    assert interrupts > 50
    assert step == script.step
