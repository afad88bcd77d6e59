"""Weights that have diverged: whoever evaluates or samples is told so, and the server goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.errors import DivergedError

Serve = Callable[..., ServerProcess]
TOKENS = np.arange(16).reshape(2, 8)

ASKED: dict[str, Callable[[Any], Any]] = {
    "eval_loss": lambda client: client.eval_loss(TOKENS, draws=2),
    "evaluate": lambda client: client.evaluate(TOKENS, draws=2),
    "chain rule": lambda client: client.eval_loss(TOKENS, estimator="chain_rule"),
    "critic alone": lambda client: client.eval_loss(TOKENS, draws=2, only_train_critic=True),
    "generate": lambda client: client.generate(count=2, length=4),
    "generate by confidence": lambda client: client.generate(count=2, length=4, order="confidence"),
    "generate by the critic": lambda client: client.generate(count=2, length=4, order="critic", steps=2),
    "generate the most probable": lambda client: client.generate(count=2, length=4, temperature=0.0),
}


def test_diverged_weights_are_refused_by_name_and_a_checkpoint_cures_them(serve: Serve) -> None:
    server = serve(objective__critic="token")

    async def beside() -> list[str]:
        async with maskwire.aio.attach(server.address) as client:
            return [await told_async(ask(client)) for ask in ASKED.values()]

    with maskwire.connect(server.address) as trainer:
        trainer.train_step(TOKENS)
        trainer.checkpoint("before")
        healthy = trainer.eval_loss(TOKENS, draws=2)
        while trainer.train_step(TOKENS, learning_rate=1e30).outcome.name == "APPLIED":
            pass
        for words in [told(ask, trainer) for ask in ASKED.values()] + asyncio.run(beside()):
            assert "the weights have diverged" in words
            assert "`maskwire checkpoint restore NAME`" in words
        assert "diverged" in trainer.status().last_error
        trainer.restore("before")
        assert trainer.eval_loss(TOKENS, draws=2).nats_per_token == healthy.nats_per_token
        assert trainer.generate(count=1, length=4).done
    assert server.stop() == 0


def told(ask: Callable[[Any], Any], client: Any) -> str:
    with pytest.raises(DivergedError) as raised:
        ask(client)
    assert raised.value.reason == "DIVERGED"
    return str(raised.value)


async def told_async(asked: Any) -> str:
    with pytest.raises(DivergedError) as raised:
        await asked
    return str(raised.value)


def test_the_losses_of_an_evaluation_are_named_as_a_steps_are(serve: Serve) -> None:
    with maskwire.connect(serve(objective__critic="token").address) as trainer:
        found = trainer.eval_loss(TOKENS, draws=2)
        assert found.generator_loss == found.losses.generator_loss
        assert found.critic_loss == found.losses.critic_loss
        assert found.generator_loss is not None
        assert found.critic_loss is not None
        assert trainer.eval_loss(TOKENS, draws=2, only_train_generator=True).critic_loss is None
