"""Clients in forked children, in pickles, and in programs that end while the server is gone."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio

Serve = Callable[..., ServerProcess]
SECONDS = 60  # far below the 300 s for which a server that is gone is asked again

PRELUDE = """
    import asyncio, atexit, os, signal, sys
    import numpy as np
    import maskwire, maskwire.aio
    from maskwire.errors import ForkError

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    address, server = sys.argv[1], int(sys.argv[2])
    tokens = np.zeros((1, 4), int)

    def in_child(act):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            act()
            sys.stdout.flush()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0

    def told(name, call):
        try:
            print(name, "returned", call())
        except ForkError as error:
            print(name, error.reason, f"forked child {os.getpid()}" in str(error), address in str(error))
"""


def run(server: ServerProcess, script: str) -> subprocess.CompletedProcess[str]:
    """Run a program beside a server, whose address and process id it is told.

    During a call, gRPC's own fork handlers can crash a child before Python runs (docs/client.md).
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script),
         server.address, str(server.process.pid)],
        capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
    )  # fmt: skip


def test_a_forked_child_is_refused_at_once_and_leaves_the_parents_session(serve: Serve) -> None:
    done = run(serve(seconds=0), """
        trainer = maskwire.connect(address, name="parent")
        trainer.train_step(tokens)

        def child():
            atexit.register(trainer.close)
            told("train_step", lambda: trainer.train_step(tokens))
            told("submit", lambda: trainer.submit(tokens))
            told("status", trainer.status)
            told("evaluate", lambda: trainer.evaluate([[1, 2]]))
            told("generate_steps", lambda: next(iter(trainer.generate_steps(count=1))))
            told("restore", lambda: trainer.restore("a"))
            told("settle", trainer.settle)
            with trainer:
                pass

        in_child(child)
        print(trainer.train_step(tokens).step, trainer.status().writer)
        trainer.close()
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *children, parent = done.stdout.splitlines()
    assert children == [
        f"{call} FORKED True True"
        for call in ("train_step", "submit", "status", "evaluate", "generate_steps", "restore", "settle")
    ]
    assert parent == "2 parent"


def test_a_forked_child_of_an_asyncio_client_is_refused_too(serve: Serve) -> None:
    done = run(serve(seconds=0), """
        async def main():
            trainer = await maskwire.aio.connect(address, name="parent")
            beside = maskwire.aio.attach(address)
            await trainer.train_step(tokens)
            await beside.status()

            def child():
                told("train_step", lambda: drive(trainer.train_step(tokens)))
                told("status", lambda: drive(beside.status()))
                drive(trainer.close())
                drive(beside.close())

            in_child(child)
            print((await trainer.train_step(tokens)).step, (await beside.status()).writer)
            await trainer.close()
            await beside.close()

        def drive(coroutine):  # the child has the parent's loop, which must not run there
            try:
                coroutine.send(None)
            except StopIteration as done:
                return done.value

        asyncio.run(main())
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["train_step FORKED True True", "status FORKED True True", "2 parent"]


def test_an_iterator_begun_before_a_fork_ends_in_the_child_alone(serve: Serve) -> None:
    done = run(serve(seconds=0), """
        with maskwire.connect(address) as trainer:
            for _ in range(3):
                trainer.train_step(tokens)
            passes, steps = trainer.generate_steps(count=1, length=4, steps=4), trainer.list_steps()
            next(passes), next(steps)

            def child():
                told("generate_steps", lambda: list(passes))
                told("list_steps", lambda: list(steps))

            in_child(child)
            print(list(passes)[-1].done, [step.step for step in steps])
    """)  # fmt: skip
    assert done.stdout.splitlines() == [
        "generate_steps FORKED True True", "list_steps FORKED True True", "True [2, 3]",
    ], done.stderr  # fmt: skip


def test_a_call_whose_callback_forks_ends_in_the_child_alone(serve: Serve, tmp_path: Path) -> None:
    done = run(serve(seconds=0), f"""
        data = maskwire.TokenData([np.arange(10, 30)], length=4, batch_size=2)
        folder = {str(tmp_path)!r}

        def once():
            # A callback that forks when it is first called, and waits for its child.
            forked = []
            def callback(*_):
                if not forked:
                    sys.stdout.flush()
                    forked.append(os.fork())
                    if forked[0]:
                        os.waitpid(forked[0], 0)
            return callback

        def both(name, call):
            parent = os.getpid()
            try:
                print(name, "returned", call())
            except ForkError as error:
                print(name, error.reason)
                sys.stdout.flush()
            if os.getpid() != parent:
                os._exit(0)

        with maskwire.connect(address) as trainer:
            fit = lambda: trainer.fit(data, until_step=8, progress=False, on_step=once()).step
            both("fit", fit)
            both("evaluate", lambda: trainer.evaluate(data, batch_size=1, draws=1, on_progress=once()).tokens)
            trainer.checkpoint("a")
            def download():
                trainer.download("a", folder, on_progress=once())
                return os.path.exists(folder + "/manifest.json")
            both("download", download)
    """)  # fmt: skip
    assert done.stdout.splitlines() == [
        "fit FORKED", "fit returned 8",
        "evaluate FORKED", "evaluate returned 20",
        "download FORKED", "download returned True",
    ], done.stderr  # fmt: skip


def test_an_asyncio_iterator_begun_before_a_fork_ends_in_the_child_alone(serve: Serve) -> None:
    done = run(serve(seconds=0), """
        async def main():
            client = maskwire.aio.attach(address)
            passes = client.generate_steps(count=1, length=4, steps=4)
            await anext(passes)

            def child():
                told("generate_steps", lambda: anext(passes).send(None))
                sys.stdout.flush()
                os._exit(0)

            in_child(child)
            print([found.done async for found in passes][-1])
            await client.close()

        asyncio.run(main())
    """)  # fmt: skip
    assert done.stdout.splitlines() == ["generate_steps FORKED True True", "True"], done.stderr


def test_a_client_that_the_parent_never_used_is_refused_in_the_child(serve: Serve) -> None:
    done = run(serve(seconds=0), """
        client = maskwire.attach(address)
        in_child(lambda: told("status", client.status))
        print(client.status().step)
    """)  # fmt: skip
    assert done.stdout.splitlines() == ["status FORKED True True", "0"], done.stderr


@pytest.mark.parametrize("package", [maskwire, maskwire.aio])
@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_client_says_why_it_does_not_pickle(package: Any, how: Callable[[Any], Any]) -> None:
    client = package.attach("127.0.0.1:50051")
    with pytest.raises(TypeError, match=r"Client cannot be pickled.*127\.0\.0\.1:50051.*maskwire\.attach"):
        how(client)


BLOCKING = """
    with maskwire.connect(address) as trainer:
        trainer.train_step(tokens)
        os.kill(server, signal.SIGKILL)
        trainer.submit(tokens)
        {end}
"""
ASYNCIO = """
    async def main():
        async with await maskwire.aio.connect(address) as trainer:
            await trainer.train_step(tokens)
            os.kill(server, signal.SIGKILL)
            await trainer.submit(tokens)
            {end}

    asyncio.run(main())
"""
WITHOUT = """
    trainer = maskwire.connect(address)
    trainer.train_step(tokens)
    os.kill(server, signal.SIGKILL)
    trainer.submit(tokens)
    {end}
"""


@pytest.mark.parametrize("program", [BLOCKING, ASYNCIO, WITHOUT], ids=["with", "async with", "without"])
@pytest.mark.parametrize(
    "end", ['raise ValueError("a bug of mine")', "signal.raise_signal(signal.SIGINT)", "sys.exit(7)"]
)
def test_a_program_ends_at_once_although_the_server_is_gone(serve: Serve, program: str, end: str) -> None:
    server = serve(seconds=0)
    done = run(server, program.format(end=end))
    server.kill()
    if "ValueError" in end:
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == "ValueError: a bug of mine"
    elif "SIGINT" in end:
        assert done.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in done.stderr
    else:
        assert done.returncode == 7


def test_steps_in_flight_are_trained_when_a_program_ends_without_closing(serve: Serve) -> None:
    server = serve(seconds=0.2)
    done = run(server, "trainer = maskwire.connect(address)\nfor _ in range(3): trainer.submit(tokens)")
    assert done.returncode == 0, done.stderr
    with maskwire.attach(server.address) as client:
        assert client.status().step == 3


def test_steps_in_flight_are_trained_when_an_exception_leaves_the_block(serve: Serve) -> None:
    server = serve(seconds=0)
    done = run(server, """
        maskwire.client.EXIT_GRACE = 30  # so that the test does not hang on how fast this machine is
        with maskwire.connect(address) as trainer:
            futures = [trainer.submit(tokens) for _ in range(3)]
            raise ValueError("a bug of mine")
    """)  # fmt: skip
    assert "a bug of mine" in done.stderr
    with maskwire.attach(server.address) as client:
        status = client.status()
        assert (status.step, status.writer) == (3, ""), "the session was closed"


@pytest.mark.parametrize("package", [maskwire, maskwire.aio])
def test_a_closed_client_says_so(serve: Serve, package: Any) -> None:
    import asyncio

    address = serve(seconds=0).address

    async def wait(value: Any) -> Any:
        return await value if asyncio.iscoroutine(value) else value

    async def main() -> None:
        client = package.attach(address)
        await wait(client.status())
        await wait(client.close())
        with pytest.raises(maskwire.MaskwireError, match="closed"):
            await wait(client.status())

    asyncio.run(main())
