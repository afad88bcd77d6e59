"""The blocking and the asyncio client: each test body runs on both, against real server processes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.errors import (
    CheckpointError,
    DataMismatchError,
    DigestVersionError,
    FencedError,
    InvalidRequestError,
    MaskwireError,
    RequestError,
    TokenizerError,
    UnavailableError,
    WriterPresentError,
    WrongRunError,
)
from maskwire.protocol.codec import hash_of, step_request
from maskwire.v1.digest import DigestVersion

Serve = Callable[..., ServerProcess]
Body = Callable[[ServerProcess, Any], Coroutine[Any, Any, None]]


def tokens(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(10, 200, (4, 16))


class Awaited:
    """A blocking client with the asyncio client's manners, so that one body drives both."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.ismethod(value):
            return value

        async def call(*arguments: Any, **options: Any) -> Any:
            if "evaluate" in options:
                options["evaluate"] = self._blocking(options["evaluate"])
            result = value(*arguments, **options)
            return asyncio.wrap_future(result) if isinstance(result, Future) else result

        return call

    @staticmethod
    def _blocking(evaluate: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Any]:
        def run(trainer: Any) -> Any:
            coroutine: Any = evaluate(Awaited(trainer))
            try:
                coroutine.send(None)
            except StopIteration as done:
                return done.value
            raise AssertionError("the blocking client awaited something")

        return run


class Blocking:
    @contextlib.asynccontextmanager
    async def connect(self, target: str, **options: Any) -> AsyncIterator[Any]:
        with maskwire.connect(target, on_wait=lambda _: None, **options) as trainer:
            yield Awaited(trainer)

    @contextlib.asynccontextmanager
    async def attach(self, target: str, **options: Any) -> AsyncIterator[Any]:
        with maskwire.attach(target, on_wait=lambda _: None, **options) as client:
            yield Awaited(client)

    async def stub_of(self, trainer: Any) -> Any:
        """The stub that sends submitted steps, on threads of their own."""
        return await asyncio.to_thread(lambda: trainer._stub)


class Asyncio:
    @contextlib.asynccontextmanager
    async def connect(self, target: str, **options: Any) -> AsyncIterator[Any]:
        async with await maskwire.aio.connect(target, on_wait=lambda _: None, **options) as trainer:
            yield trainer

    @contextlib.asynccontextmanager
    async def attach(self, target: str, **options: Any) -> AsyncIterator[Any]:
        async with maskwire.aio.attach(target, on_wait=lambda _: None, **options) as client:
            yield client

    async def stub_of(self, trainer: Any) -> Any:
        """The stub that sends steps."""
        return trainer._stub


def late(call: Callable[..., Any], seconds: Callable[[], float]) -> Callable[..., Any]:
    """A call whose request, and whose answer, take so long to arrive."""

    def blocking(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds())
        try:
            return call(*arguments, **options)
        finally:
            time.sleep(seconds())

    async def awaited(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(seconds())
        try:
            return await call(*arguments, **options)
        finally:
            await asyncio.sleep(seconds())

    return awaited if "aio" in type(call).__module__ else blocking


class Numbered:
    tokenizer = "bytes"

    def batch(self, step: int) -> Any:
        return tokens(step)


async def trains_evaluates_and_checkpoints(server: ServerProcess, client: Any) -> None:
    async with client.connect(server.address) as trainer:
        assert trainer.model.num_tokens == 257
        first = await trainer.train_step(tokens(0))
        futures = [await trainer.submit(tokens(seed)) for seed in range(1, 10)]
        steps = [await future for future in futures]
        assert [first.step, *(step.step for step in steps)] == list(range(1, 11))
        assert (trainer.step, trainer.digest) == (10, steps[-1].digest)
        assert (await trainer.eval_loss(tokens(0), draws=2)).draws == 2
        saved = await trainer.checkpoint("ten", labels={"a": "b"})
        assert (saved.step, saved.labels) == (10, {"a": "b"})
        assert [info.name for info in await trainer.checkpoints()] == ["ten", "step-000000000"]
        status = await trainer.status()
        assert (status.step, status.digest) == (10, trainer.digest)
        await trainer.train_step(tokens(11))
        with pytest.raises(WrongRunError, match="expected_step is 10, but the run is at step 11"):
            await trainer.checkpoint(score=1.0, expected_step=10)
        back = await trainer.restore("ten", expected_step=11)
        assert (back.step, back.lineage, trainer.lineage, trainer.step) == (10, 2, 2, 10)
        assert (await trainer.train_step(tokens(11))).step == 11


async def refuses_with_the_same_errors(server: ServerProcess, client: Any) -> None:
    async with client.connect(server.address, name="first") as trainer:
        with pytest.raises(InvalidRequestError, match="mask id") as raised:
            await trainer.train_step(np.full((2, 4), 256))
        assert raised.value.field == "batch.data"
        good, bad = tokens(0), np.full((4, 16), 256)
        futures = [await trainer.submit(rows) for rows in (good, bad, good, good, bad, good)]
        for refused in (1, 4):
            with pytest.raises(InvalidRequestError):
                await futures[refused]
        assert [(await futures[i]).step for i in (0, 2, 3, 5)] == [1, 2, 3, 4]
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await trainer.restore("nothing")
        with pytest.raises(TypeError, match="must be integers"):
            await trainer.train_step([[1.5]])
        with pytest.raises(WriterPresentError, match="'first' has a session open"):
            async with client.connect(server.address, name="second"):
                pass
        async with client.connect(server.address, name="second", takeover=True) as second:
            assert (await second.train_step(tokens(1))).step == 5
            with pytest.raises(FencedError):
                await trainer.train_step(tokens(1))
    with pytest.raises(MaskwireError, match="closed"):
        await trainer.train_step(tokens(1))
    with pytest.raises(UnavailableError, match="is the server running"):
        async with client.attach("127.0.0.1:1", retry_for=0.2) as nowhere:
            await nowhere.status()


async def finds_that_it_is_too_old_for_the_digest(server: ServerProcess, client: Any) -> None:
    async with client.connect(server.address, name="new") as trainer:
        await trainer.train_step(tokens(0))
        assert (await trainer.status()).digest_version == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskwire.protocol.session.VERSIONS", (1,))
        with pytest.raises(DigestVersionError, match=r"uses digest version 2, .* \(it supports 1\)"):
            async with client.connect(server.address, name="old"):
                pass


async def fits_with_evaluations_and_metrics(server: ServerProcess, client: Any) -> None:
    metrics = server.folder / "metrics.jsonl"

    async def evaluate(trainer: Any) -> Any:
        return await trainer.eval_loss(tokens(99))

    async with client.connect(server.address) as trainer:
        result = await trainer.fit(
            Numbered(), until_step=10, evaluate=evaluate, eval_every=4, checkpoint_every=5, metrics=metrics,
            progress=False, learning_rate=0.5,
        )  # fmt: skip
        assert (result.step, result.first_step, result.interrupted) == (10, 1, False)
        assert [found.step for found in result.evaluations] == [4, 8]
        assert (await trainer.fit(Numbered(), until_step=10, progress=False)).last is None, "nothing is left"
        assert (await trainer.status()).tokenizer == "bytes", "the data's tokenizer was kept with the run"
        with pytest.raises(
            TokenizerError, match="the run uses tokenizer bytes, but this client uses sha256:0"
        ):
            await trainer.use_tokenizer("sha256:0")
        data = {"content": "sha256:0", "length": "16"}
        await trainer.use_data(data)
        with pytest.raises(DataMismatchError, match="length was 16 and is now 32"):
            await trainer.use_data({**data, "length": "32"})
        assert (await trainer.status()).data == data
        await trainer.use_data({**data, "length": "32"}, allow_changed=True)
        assert (await trainer.status()).data == {**data, "length": "32"}
        with pytest.raises(InvalidRequestError, match="at most 16 parts"):
            await trainer.use_data({str(number): "a" for number in range(17)}, allow_changed=True)
        assert {info.step for info in await trainer.checkpoints()} >= {5, 10}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert {line["learning_rate"] for line in lines if "loss" in line} == {0.5}


async def goes_on_after_a_kill(server: ServerProcess, client: Any) -> None:
    server._command.append(f"--set=serve.address={server.address}")
    async with client.connect(server.address) as trainer:
        await trainer.train_step(tokens(0))
        server.kill()
        loop = asyncio.get_running_loop()
        back = loop.run_in_executor(None, server.start)
        futures = [await trainer.submit(tokens(seed)) for seed in range(1, 9)]
        assert [(await future).step for future in futures] == list(range(2, 10))
        await back
        assert (await trainer.status()).step == 9


async def downloads_beside_the_writer(server: ServerProcess, client: Any) -> None:
    told: list[tuple[int, int]] = []
    async with client.connect(server.address) as trainer:
        await trainer.train_step(tokens(0))
        saved = await trainer.checkpoint("one")
        async with client.attach(server.address) as reader:
            folder = server.folder / "here"
            got = await reader.download("one", folder, on_progress=lambda *places: told.append(places))
            assert got == folder
            assert {path.name for path in folder.iterdir()} == {*saved.files, "manifest.json"}
            assert told[-1] == (saved.size_bytes, saved.size_bytes)
            with pytest.raises(CheckpointError, match="no checkpoint is named 'two'"):
                await reader.download("two", folder)
            with pytest.raises(CheckpointError, match=r"has no file ema\.safetensors"):
                await reader.download("one", server.folder / "ema", ema=True)
        for name in saved.files:
            original = server.folder / "run" / "checkpoints" / "one" / name
            assert (folder / name).read_bytes() == original.read_bytes()


async def states_of(client: Any, *arguments: Any, **options: Any) -> list[Any]:
    states = client.generate_steps(*arguments, **options)
    if inspect.isawaitable(states):
        states = await states
    if hasattr(states, "__aiter__"):
        return [state async for state in states]
    return list(states)


async def generates_and_fills_in(server: ServerProcess, client: Any) -> None:
    async with client.connect(server.address) as trainer, client.attach(server.address) as reader:
        await trainer.train_step(tokens(0))
        found = await reader.generate(count=3, length=5, seed=7)
        assert found.tokens.dtype == np.int64
        assert found.tokens.tolist() == [[7 + i, 8 + i, 9 + i, 10 + i, 11 + i] for i in range(3)]
        assert (found.step, found.digest) == (1, trainer.digest)
        assert (found.done, found.still_masked, found.unmasking_step) == (True, (0, 0, 0), 5)
        states = await states_of(reader, [[256, 5], [1, 256, 256]], row_seeds=[10, 20])
        assert [state.still_masked for state in states] == [(0, 1), (0, 0)]
        assert [row.tolist() for row in states[0].tokens] == [[10, 5], [1, 21, 256]]
        assert [row.tolist() for row in states[1].tokens] == [[10, 5], [1, 21, 22]]
        ids, known = np.zeros((2, 3), dtype=int), np.eye(2, 3, dtype=bool)
        same = await trainer.generate(ids, prompt_mask=known)
        assert same.tokens.tolist() == [[0, 1, 2], [1, 0, 3]]
        only = await trainer.generate(ids, prompt_mask=known, count=1)
        assert only.tokens.tolist() == [[0, 1, 2]]
        with pytest.raises(InvalidRequestError, match="needs a critic") as raised:
            await states_of(reader, count=1, order="critic")
        assert raised.value.field == "order"
        with pytest.raises(ValueError, match="order must be one of random"):
            await reader.generate(order="alphabetical")
        with pytest.raises(ValueError, match="need prompts, but prompts is None"):
            await reader.generate(lengths=[1])


async def asks_for_a_generation_until_a_server_is_there(server: ServerProcess, client: Any) -> None:
    server._command.append(f"--set=serve.address={server.address}")
    async with client.attach(server.address) as reader:
        assert (await reader.generate(count=1, length=1)).done
        server.kill()
        back = asyncio.get_running_loop().run_in_executor(None, server.start)
        assert len(await states_of(reader, count=1, length=4)) == 4
        await back


BODIES: list[Body] = [
    generates_and_fills_in,
    asks_for_a_generation_until_a_server_is_there,
    trains_evaluates_and_checkpoints,
    refuses_with_the_same_errors,
    finds_that_it_is_too_old_for_the_digest,
    fits_with_evaluations_and_metrics,
    goes_on_after_a_kill,
    downloads_beside_the_writer,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.parametrize("client", [Blocking(), Asyncio()], ids=lambda client: type(client).__name__)
def test_the_client(serve: Serve, client: Any, body: Body) -> None:
    asyncio.run(body(serve(seconds=0), client))


@pytest.mark.parametrize("client", [Blocking(), Asyncio()], ids=lambda client: type(client).__name__)
def test_refused_steps_leave_the_others_in_order_however_long_each_travels(serve: Serve, client: Any) -> None:
    server = serve(seconds=0, serve__gap_seconds="600")  # nobody is rescued by it
    rng = random.Random(1)
    not_taken = np.full((4, 16), 256), np.full((4, 16), 8)  # the mask id; what the counter trainer fails on

    async def body() -> None:
        async with client.connect(server.address, window=6) as trainer:
            stub = await client.stub_of(trainer)
            stub.TrainStep = late(stub.TrainStep, lambda: rng.choice((0, 0, 0.005, 0.02, 0.06)))
            step = 0
            for _ in range(12):
                rows = [
                    rng.choice(not_taken) if rng.random() < 0.35 else tokens(rng.randrange(99))
                    for _ in range(8)
                ]
                futures = [await trainer.submit(batch) for batch in rows]
                for batch, future in zip(rows, futures, strict=True):
                    if any(batch is one for one in not_taken):
                        with pytest.raises(MaskwireError, match=r"mask id|error"):
                            await asyncio.wait_for(future, 30)
                    else:
                        step += 1
                        assert (await asyncio.wait_for(future, 30)).step == step

    asyncio.run(body())


@pytest.mark.parametrize("client", [Blocking(), Asyncio()], ids=lambda client: type(client).__name__)
def test_a_batch_over_the_size_limit_is_not_sent_and_those_behind_it_are_trained(
    serve: Serve, client: Any
) -> None:
    server = serve(seconds=0, serve__gap_seconds="600", serve__max_message_bytes="65536")

    async def body() -> None:
        async with client.connect(server.address) as trainer:
            first = await trainer.submit(tokens(0))
            with pytest.raises(RequestError, match=r"131,\d+ bytes, but the server accepts at most 65,536"):
                await trainer.submit(np.full((8, 8192), 1))
            behind = [await trainer.submit(tokens(seed)) for seed in (1, 2)]
            assert [(await asyncio.wait_for(future, 30)).step for future in (first, *behind)] == [1, 2, 3]

    asyncio.run(body())


@pytest.mark.parametrize("client", [Blocking(), Asyncio()], ids=lambda client: type(client).__name__)
def test_several_batches_are_the_step_of_all_their_rows_and_keep_the_limits_of_one(
    serve: Serve, client: Any
) -> None:
    limits = {"serve__max_batch_tokens": "256", "serve__max_message_bytes": "65536"}
    single, several = serve("one", seconds=0, **limits), serve("several", seconds=0, **limits)
    rows, mask = [*tokens(1), *tokens(2)[:, :5], *tokens(3)], np.zeros((4, 5), dtype=bool)
    mask[:, :2] = True
    masks = [np.zeros(16, dtype=bool)] * 4 + list(mask) + [np.zeros(16, dtype=bool)] * 4
    batches = [tokens(1), maskwire.Batch(tokens(2)[:, :5], prompt_mask=mask), tokens(3)]
    with maskwire.connect(single.address) as trainer:
        first = trainer.train_step(rows, prompt_mask=masks, learning_rate=0.5)

    async def body() -> None:
        async with client.connect(several.address) as trainer:
            result = await trainer.train_step(batches=batches, learning_rate=0.5)
            assert (result.step, result.loss, result.digest) == (1, first.loss, first.digest)
            with pytest.raises(InvalidRequestError, match=r"at most 256 .*, got 20 x 16"):
                await trainer.train_step(batches=[tokens(seed) for seed in range(5)])
            future = await trainer.submit(batches=batches[::2], step=2)
            assert (await asyncio.wait_for(future, 30)).step == 2

    asyncio.run(body())


def test_a_cancelled_step_stays_in_flight_and_the_next_has_the_next_number(serve: Serve) -> None:
    server = serve(seconds=0.3)

    async def body() -> None:
        async with await maskwire.aio.connect(server.address) as trainer:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(trainer.train_step(tokens(0)), 0.05)
            assert (await trainer.train_step(tokens(1))).step == 2

    asyncio.run(body())


def test_a_step_that_is_cancelled_before_it_was_sent_leaves_its_place(serve: Serve) -> None:
    server = serve(seconds=0.3)

    async def body() -> None:
        async with await maskwire.aio.connect(server.address) as trainer:
            first = await trainer.submit(tokens(0))
            with pytest.raises(InvalidRequestError):
                await (await trainer.submit(np.full((4, 16), 256)))
            second = await trainer.submit(tokens(1))
            with pytest.raises(TimeoutError):  # it waits for the second, which takes the refused one's place
                await asyncio.wait_for(trainer.submit(tokens(2)), 0.05)
            third = await trainer.submit(tokens(3))
            assert [(await future).step for future in (first, second, third)] == [1, 2, 3]
            assert trainer.digest == (await third).digest

    asyncio.run(body())


def test_closing_waits_for_a_step_that_waits_to_be_sent(serve: Serve) -> None:
    server = serve(seconds=0.2)

    async def body() -> None:
        trainer = await maskwire.aio.connect(server.address)
        first = await trainer.submit(tokens(0))
        with pytest.raises(InvalidRequestError):
            await (await trainer.submit(np.full((4, 16), 256)))
        second = await trainer.submit(tokens(1))
        third = asyncio.create_task(trainer.train_step(tokens(2)))
        await asyncio.sleep(0)
        await trainer.close()
        assert [(await future).step for future in (first, second, third)] == [1, 2, 3]

    asyncio.run(body())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell runs the tests in the background and lets SIGINT be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_step_stays_in_flight_and_the_next_has_the_next_number(serve: Serve) -> None:
    import _thread
    import threading

    server = serve(seconds=0.3)
    with maskwire.connect(server.address) as trainer:
        timer = threading.Timer(0.1, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            trainer.train_step(tokens(0))
        timer.join()
        assert trainer.train_step(tokens(1)).step == 2
        assert trainer.status().step == 2


def test_cancelling_a_fit_ends_it_and_leaves_the_run_in_order(serve: Serve) -> None:
    server = serve(seconds=0.05)

    async def body() -> None:
        async with await maskwire.aio.connect(server.address) as trainer:
            task = asyncio.create_task(trainer.fit(Numbered(), until_step=1000, progress=False))
            while trainer.step < 3:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert 1 <= trainer.step < 30
            await trainer.fit(Numbered(), until_step=40, progress=False)
            assert trainer.step == 40

    asyncio.run(body())
    server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "run" / "journal.sqlite")) as journal:
        hashes = [row[0] for row in journal.execute("SELECT payload_hash FROM steps ORDER BY step")]
    version = DigestVersion(2, 257)
    expected = [hash_of(step_request("", tokens(step), learning_rate=None), version) for step in range(1, 41)]
    assert hashes == expected, "each step had its own batch"
