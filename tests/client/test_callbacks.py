"""Callbacks of the training loop: what they are told, how they end it, and what their failure costs."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from counting_trainer import Counting, Numbered, evaluation, fit

import maskwire
from maskwire.aio import Trainer
from maskwire.callbacks import EarlyStopping, SaveBest, StopTraining
from maskwire.errors import FencedError, UnavailableError
from maskwire.loggers.json_lines import JsonLines
from maskwire.protocol.fit import fit as training_loop
from maskwire.results import CheckpointInfo


class Saving(Counting):
    """Its checkpoints have the type of real ones."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(step)
        self.infos: list[CheckpointInfo] = []

    def checkpoints(self) -> list[Any]:
        return self.infos

    def checkpoint(self, *, score: float | None = None, **place: int) -> CheckpointInfo:
        name = super().checkpoint(score=score, **place).name
        info = CheckpointInfo(name, 1, self.step, self.digest, 0, {}, datetime.now(UTC), {}, score)
        self.infos.append(info)
        return info


class Looped(Saving):
    """As the asyncio client's trainer."""

    _run_fit = Trainer._run_fit

    async def submit(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        # As in the asyncio client, a cancelled task leaves its steps in flight.
        return asyncio.shield(asyncio.wrap_future(super().submit(*arguments, **options)))


class Recording:
    """Notes each call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, trainer: Any) -> None:
        self.calls.append(("start", trainer.step))

    def on_step(self, result: Any) -> None:
        self.calls.append(result.step)

    def on_evaluate(self, result: Any) -> None:
        self.calls.append(("evaluate", result.step))

    def on_checkpoint(self, info: Any) -> Any:
        self.calls.append(("checkpoint", info.name))
        return info  # not a checkpoint of its own

    def on_end(self, result: Any) -> None:
        self.calls.append(("end", result.step))


def scored(*nats: float) -> Any:
    """An evaluation that returns these figures in turn."""
    figures = iter(nats)

    def evaluate(trainer: Counting) -> Any:
        return SimpleNamespace(
            step=trainer.step, bits_per_token=2.0, nats_per_token=next(figures), standard_error=None
        )

    return evaluate


def test_a_callback_is_told_of_all_that_happens_in_order() -> None:
    seen = Recording()
    fit(
        Saving(step=1), Numbered(), until_step=4, evaluate=evaluation, eval_every=2, checkpoint_every=3,
        callbacks=[seen], progress=False,
    )  # fmt: skip
    assert seen.calls == [
        ("start", 1), 2, ("evaluate", 2), 3, ("checkpoint", "step-3"), 4, ("evaluate", 4), ("end", 4),
    ]  # fmt: skip


def test_a_callback_that_raises_costs_no_step_and_is_reported(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Recording):
        def on_step(self, result: Any) -> None:
            super().on_step(result)
            if result.step == 2:
                raise KeyError("no such thing")

    broken, other, by_function = Broken(), Recording(), []
    trainer = Saving()
    with caplog.at_level(logging.WARNING):
        result = fit(
            trainer, Numbered(), until_step=6, callbacks=[broken, other],
            on_step=lambda found: by_function.append(found.step),
        )  # fmt: skip
    assert (result.step, trainer.step, result.stopped) == (6, 6, False)
    assert broken.calls == [("start", 0), 1, 2], "it is not called again"
    assert other.calls == [("start", 0), *range(1, 7), ("end", 6)]
    assert by_function == [*range(1, 7)]
    (failure,) = result.failures
    assert failure.startswith("Broken.on_step raised KeyError: 'no such thing'; this callback is not called")
    assert failure in capsys.readouterr().err
    assert any(record.exc_info for record in caplog.records), "the log has the traceback"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine")])
def test_what_on_step_raises_comes_out_of_fit(error: Exception) -> None:
    def on_step(result: Any) -> None:
        if result.step == 3:
            raise error

    trainer, seen = Saving(), Recording()
    with pytest.raises(type(error), match="mine"):
        fit(trainer, Numbered(), until_step=50, callbacks=[seen], on_step=on_step, progress=False)
    assert ("end", 3) in seen.calls


def test_an_error_of_the_run_in_a_callback_ends_fit() -> None:
    class Fenced(Recording):
        def on_evaluate(self, result: Any) -> None:
            raise FencedError("another writer took over")

    with pytest.raises(FencedError):
        fit(
            Saving(), Numbered(), until_step=9, evaluate=evaluation, eval_every=2, callbacks=[Fenced()],
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("by", ["callback", "on_step", "evaluate", "data", "learning_rate", "on_evaluate"])
def test_stop_training_ends_with_a_checkpoint_of_the_last_step(by: str) -> None:
    class Stopping(Recording):
        def on_step(self, result: Any) -> None:
            super().on_step(result)
            if by == "callback" and result.step == 3:
                raise StopTraining("enough")

        def on_evaluate(self, result: Any) -> None:
            super().on_evaluate(result)
            if by == "on_evaluate":
                raise StopTraining("enough")

    def stop(name: str, step: int, value: Any) -> Any:
        if by == name and step >= 3:
            raise StopTraining("enough")
        return value

    class Data:
        def batch(self, step: int) -> Any:
            return stop("data", step, np.full((2, 5), step))

    stopping, other, trainer = Stopping(), Recording(), Saving()
    result = fit(
        trainer, Data(), until_step=100, progress=False, callbacks=[stopping, other],
        on_step=lambda found: stop("on_step", found.step, None),
        learning_rate=lambda step: stop("learning_rate", step, 0.5),
        evaluate=lambda found: stop("evaluate", found.step, evaluation(found)), eval_every=4,
    )  # fmt: skip
    assert (result.stopped, result.stop_reason, result.interrupted) == (True, "enough", False)
    assert trainer.in_flight == 0
    assert result.step == trainer.step == trainer.handed_in < 12, "the steps in flight were taken"
    assert trainer.saved == [result.step], "their state is saved"
    assert other.calls[-2:] == [("checkpoint", f"step-{result.step}"), ("end", result.step)]
    assert [one for one in other.calls if isinstance(one, int)] == [*range(1, result.step + 1)]
    if by == "callback":
        assert [one for one in stopping.calls if isinstance(one, int)] == [1, 2, 3], "it asked for no more"
    if by == "on_evaluate":
        assert trainer.marked == [4], "that evaluation is finished"
    assert fit(trainer, Numbered(), until_step=result.step, progress=False).stopped is False


def test_stopping_saves_no_second_checkpoint_and_none_unless_wanted() -> None:
    def stop(result: Any) -> None:
        raise StopTraining(checkpoint=result.step != 1)

    trainer = Saving()
    assert fit(trainer, Numbered(), until_step=1, on_step=stop, progress=False).stopped
    assert trainer.saved == []
    assert fit(trainer, Numbered(), until_step=2, on_step=stop, progress=False).stopped
    assert trainer.saved == [2]

    class Early:
        def on_start(self, trainer: Any) -> None:
            raise StopTraining

    assert fit(trainer, Numbered(), until_step=9, callbacks=[Early()], progress=False).step == 2
    assert trainer.saved == [2], "it is saved already"


def test_a_checkpoint_that_stopping_cannot_save_is_reported() -> None:
    class Full(Saving):
        def checkpoint(self, **_: Any) -> CheckpointInfo:
            raise UnavailableError("no answer")

    def stop(result: Any) -> None:
        raise StopTraining

    result = fit(Full(), Numbered(), until_step=9, on_step=stop, progress=False)
    assert result.stopped
    assert result.failures == [
        f"step {result.step}: no checkpoint was saved (no answer); the steps are durable"
    ]


def test_early_stopping_counts_evaluations_without_an_improvement(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate = scored(3.0, 2.0, 1.95, float("nan"), 1.0)
    result = fit(
        Saving(), Numbered(), until_step=100, evaluate=evaluate, eval_every=2,
        callbacks=[EarlyStopping(patience=2, min_delta=0.1)],
    )  # fmt: skip
    assert (result.stopped, result.step) == (True, 8)
    words = "stopped at step 8: 2 evaluations in a row were not better than 2.0000 nats per token"
    assert words in capsys.readouterr().err
    improving = fit(
        Saving(), Numbered(), until_step=8, evaluate=scored(4, 3, 3.5, 2), eval_every=2, progress=False,
        callbacks=[EarlyStopping(patience=2)],
    )  # fmt: skip
    assert (improving.stopped, improving.step) == (False, 8)


def test_early_stopping_says_that_no_evaluation_was_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        Saving(), Numbered(), until_step=100, evaluate=scored(*[float("nan")] * 2), eval_every=2,
        callbacks=[EarlyStopping(patience=2)],
    )  # fmt: skip
    assert "stopped at step 4: 2 evaluations in a row were not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"save_best": True}, {"callbacks": [SaveBest()]}, {"callbacks": [SaveBest()], "save_best": True}],
)
def test_the_best_evaluation_is_saved_once_and_told_to_the_others(options: dict[str, Any]) -> None:
    seen, trainer = Recording(), Saving()
    options = {**options, "callbacks": [*options.get("callbacks", []), seen]}
    common: dict[str, Any] = {"eval_every": 2, "progress": False, **options}
    fit(trainer, Numbered(), until_step=6, evaluate=scored(3.0, 4.0, 2.0), **common)
    assert [(info.step, info.score) for info in trainer.infos] == [(2, 3.0), (6, 2.0)]
    assert ("checkpoint", "step-2") in seen.calls
    fit(trainer, Numbered(), until_step=10, evaluate=scored(2.5, 1.0), **common)
    assert [info.step for info in trainer.infos] == [2, 6, 10], "the best of the first call counts"


@pytest.mark.parametrize("callback", [SaveBest(), EarlyStopping()], ids=["SaveBest", "EarlyStopping"])
def test_a_callback_for_evaluations_needs_them(callback: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(callback).__name__} needs evaluate and eval_every"):
        fit(Saving(), Numbered(), until_step=4, callbacks=[callback], progress=False)


class Misspelt:
    def on_step(self, result: Any) -> None: ...

    def on_evaluation(self, result: Any) -> None: ...


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([EarlyStopping], r"callbacks\[0\] is the class EarlyStopping: pass an object, EarlyStopping\(\)"),
        ([Recording(), print], r"callbacks\[1\] is a function: pass it as on_step="),
        ([Misspelt()], r"method 'on_evaluation', which is never called: did you mean 'on_evaluate'"),
        ([object()], r"a object, has no method that fit calls: give it one of on_start, on_step"),
        (EarlyStopping(), r"callbacks must be a list of objects, got EarlyStopping: write \[callback\]"),
    ],
)
def test_what_is_no_callback_is_refused_with_what_would_be(callbacks: Any, words: str) -> None:
    trainer = Saving()
    with pytest.raises(TypeError, match=words):
        fit(trainer, Numbered(), until_step=4, callbacks=callbacks, progress=False)
    assert trainer.batches == []


@pytest.mark.parametrize(("value", "words"), [(0, "patience must be at least 1"), (2.5, "whole number")])
def test_an_impossible_patience_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EarlyStopping(patience=value)
    with pytest.raises(ValueError, match="min_delta must be finite and at least 0"):
        EarlyStopping(min_delta=-1.0)


def test_ctrl_c_while_a_callback_stops_returns_interrupted() -> None:
    class Late(Recording):
        def on_step(self, result: Any) -> None:
            if result.step == 2:
                raise KeyboardInterrupt
            if result.step > 2:
                raise StopTraining

    result = fit(Saving(), Numbered(), until_step=50, callbacks=[Late()], progress=False)
    assert (result.interrupted, result.stopped) == (True, False)


def test_ctrl_c_at_the_end_returns_interrupted() -> None:
    class Ends(Recording):
        def on_end(self, result: Any) -> None:
            raise KeyboardInterrupt

    result = fit(Saving(), Numbered(), until_step=4, callbacks=[Ends()], progress=False)
    assert (result.step, result.interrupted) == (4, True)


def test_a_batch_says_its_lengths_and_prompts_and_a_function_the_learning_rate(tmp_path: Path) -> None:
    class Described:
        def batch(self, step: int) -> Any:
            rows = np.full((2, 5), step)
            if step == 1:
                return rows
            mask = np.zeros((2, 5), bool)
            return maskwire.Batch(rows, lengths=[step, 1], prompt_mask=mask if step == 3 else None)

    trainer = Saving()
    result = fit(
        trainer, Described(), until_step=3, progress=False, only_train_generator=True,
        learning_rate=lambda step: None if step == 2 else np.float32(step / 2),
    )  # fmt: skip
    first, second, third = trainer.options
    assert first == {"only_train_generator": True, "learning_rate": 0.5}
    assert second == {"only_train_generator": True, "lengths": [2, 1]}
    assert third.pop("prompt_mask").shape == (2, 5)
    assert third == {"only_train_generator": True, "lengths": [3, 1], "learning_rate": 1.5}
    assert result.tokens == 10 + 3 + 4, "padding is no token"
    with pytest.raises(
        ValueError, match=r"lengths was given twice: in the Batch that data.batch\(2\) returned"
    ):
        fit(Saving(step=1), Described(), until_step=3, lengths=[5, 5], progress=False)


def test_a_callback_of_the_asyncio_client_may_be_a_coroutine() -> None:
    class Awaited(Recording):
        async def on_step(self, result: Any) -> None:  # type: ignore[override]
            await asyncio.sleep(0)
            self.calls.append(result.step)
            if result.step == 3:
                raise StopTraining

        async def on_end(self, result: Any) -> None:  # type: ignore[override]
            self.calls.append("ended")

    async def main() -> None:
        trainer, seen = Looped(), Awaited()
        result = await trainer._run_fit(
            training_loop(
                trainer, Numbered(), until_step=50, evaluate=scored(3.0), eval_every=2,
                callbacks=[seen, SaveBest()], progress=False,
            )
        )  # fmt: skip
        assert seen.calls == [("start", 0), 1, 2, ("evaluate", 2), ("checkpoint", "step-2"), 3,
                              ("checkpoint", f"step-{result.step}"), "ended"]  # fmt: skip

    asyncio.run(main())


def test_a_cancelled_task_of_the_asyncio_client_leaves_its_log_closed(tmp_path: Path) -> None:
    async def main() -> None:
        lines = JsonLines(tmp_path / "m.jsonl")
        task = asyncio.current_task()
        assert task is not None

        def cancel(result: Any) -> None:
            if result.step == 4:
                task.cancel()

        trainer = Looped()
        loop = training_loop(
            trainer, Numbered(), until_step=50, callbacks=[lines], on_step=cancel, progress=False
        )
        with pytest.raises(asyncio.CancelledError):
            await trainer._run_fit(loop)
        while trainer.in_flight:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    steps: list[int] = []
    deadline = time.monotonic() + 60
    while len(steps) < 4 and time.monotonic() < deadline:  # its thread goes on
        lines = (tmp_path / "m.jsonl").read_bytes().splitlines(keepends=True)
        steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) >= 4
