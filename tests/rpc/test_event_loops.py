"""An asyncio client and the event loops around it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from serving import ServerProcess

import maskwire.aio
from maskwire.errors import EventLoopError

Serve = Callable[..., ServerProcess]


def test_a_client_made_before_the_loop_works_in_the_first_that_uses_it(serve: Serve) -> None:
    client = maskwire.aio.attach(serve(seconds=0).address)

    async def main() -> int:
        async with client:
            steps = [(await client.status()).step for _ in range(2)]
            return sum(steps)

    assert asyncio.run(main()) == 0


def test_a_client_made_in_a_loop_that_never_used_it_works_in_the_next(serve: Serve) -> None:
    address = serve(seconds=0).address

    async def make() -> maskwire.aio.Client:
        return maskwire.aio.attach(address)

    async def use(client: maskwire.aio.Client) -> int:
        async with client:
            return (await client.status()).step

    assert asyncio.run(use(asyncio.run(make()))) == 0


async def _enter(client: Any) -> None:
    async with client:
        pass


async def _generate(client: Any) -> None:
    async for _ in client.generate_steps(count=1):
        pass


@pytest.mark.parametrize(
    "call",
    [lambda client: client.status(), lambda client: client.close(), _enter, _generate],
    ids=["status", "close", "async with", "generate_steps"],
)
def test_a_second_loop_is_refused_by_name(serve: Serve, call: Callable[[Any], Any]) -> None:
    client = maskwire.aio.attach(serve(seconds=0).address)

    async def first() -> None:
        await client.status()

    with asyncio.Runner() as runner:
        runner.run(first())
        with pytest.raises(EventLoopError, match=r"first, which still runs.*make a client in each loop"):
            asyncio.run(call(client))
        runner.run(client.close())
    with pytest.raises(EventLoopError, match="first, which has ended"):
        asyncio.run(call(client))


@pytest.mark.parametrize("call", ["train_step", "submit"])
def test_a_trainer_of_another_loop_is_refused(serve: Serve, call: str) -> None:
    async def connect() -> maskwire.aio.Trainer:
        return await maskwire.aio.connect(address)

    address = serve(seconds=0).address
    with asyncio.Runner() as runner:
        trainer = runner.run(connect())
        with pytest.raises(EventLoopError, match="Trainer belongs to the event loop"):
            asyncio.run(getattr(trainer, call)(np.zeros((1, 4), int)))
        assert runner.run(trainer.train_step(np.zeros((1, 4), int))).step == 1
        runner.run(trainer.close())


def test_a_client_that_was_never_used_closes_anywhere() -> None:
    asyncio.run(maskwire.aio.attach("127.0.0.1:1").close())
