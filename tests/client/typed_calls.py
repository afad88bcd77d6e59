"""What a static type checker sees of both clients. `make lint` checks this file; nothing runs it.

A wrong call is marked with the error that must be found: an unused mark is an error itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any, assert_type

import maskwire
import maskwire.aio
from maskwire import results
from maskwire.loggers import JsonLines
from maskwire.protocol.fit import FitResult


class Rows:
    def batch(self, step: int) -> Any:
        return maskwire.Batch([[step]], lengths=[1])


def right(trainer: maskwire.Trainer) -> None:
    assert_type(trainer.train_step([[1]], learning_rate=0.1), results.StepResult)
    assert_type(trainer.submit([[1]], step=3, lengths=[1]), Future[results.StepResult])
    assert_type(trainer.train_step(batches=[[[1]], maskwire.Batch([[2]])]), results.StepResult)
    assert_type(trainer.eval_loss([[1]], draws=4, estimator="chain_rule"), results.EvalResult)
    assert_type(trainer.generate(count=2, temperature=0.5), results.GenerateResult)
    assert_type(trainer.generate_steps(count=2), Iterator[results.GenerateResult])
    assert_type(trainer.checkpoint("a", labels={"b": "c"}), results.CheckpointInfo)
    assert_type(trainer.restore("a", expected_step=3), results.RestoreResult)
    found = trainer.fit(
        Rows(),
        until_step=9,
        learning_rate=lambda step: 1 / step,
        callbacks=[maskwire.EarlyStopping(patience=2), JsonLines("m.jsonl")],
        only_train_critic=True,
    )
    assert_type(found, FitResult)


def wrong(trainer: maskwire.Trainer) -> None:
    trainer.train_step([[1]], learing_rate=0.1)  # type: ignore[call-arg]
    trainer.train_step([[1]], learning_rate="fast")  # type: ignore[arg-type]
    trainer.submit([[1]], window=3)  # type: ignore[call-arg]
    trainer.eval_loss([[1]], estimator="chain")  # type: ignore[arg-type]
    trainer.generate(max_new_tokens=4)  # type: ignore[call-arg]
    trainer.checkpoint("a", lable={})  # type: ignore[call-arg]
    trainer.fit(Rows(), until_step=9, checkpoint_evry=3)  # type: ignore[call-arg]
    trainer.fit(Rows(), until_step="9")  # type: ignore[arg-type]
    trainer.fit(Rows(), until_step=9, learning_rate=lambda step: str(step))  # type: ignore[arg-type,return-value]
    trainer.fit([[1]], until_step=9)  # type: ignore[arg-type]
    trainer.fit(Rows())  # type: ignore[call-arg]
    maskwire.connect("127.0.0.1:1", time_out=3)  # type: ignore[call-arg]
    maskwire.attach("127.0.0.1:1", window=3)  # type: ignore[call-arg]


async def right_awaited(trainer: maskwire.aio.Trainer) -> None:
    assert_type(await trainer.train_step([[1]], learning_rate=0.1), results.StepResult)
    assert_type(await trainer.submit([[1]], step=3), asyncio.Future[results.StepResult])
    assert_type(await trainer.eval_loss([[1]], draws=4), results.EvalResult)
    assert_type(trainer.list_steps(lineage=1), AsyncIterator[results.RecordedStep])
    assert_type(await trainer.fit(Rows(), until_step=9, learning_rate=0.1), FitResult)


async def wrong_awaited(trainer: maskwire.aio.Trainer) -> None:
    await trainer.train_step([[1]], learing_rate=0.1)  # type: ignore[call-arg]
    await trainer.checkpoint("a", lable={})  # type: ignore[call-arg]
    await trainer.fit(Rows(), until_step=9, checkpoint_evry=3)  # type: ignore[call-arg]
    await maskwire.aio.connect("127.0.0.1:1", time_out=3)  # type: ignore[call-arg]
