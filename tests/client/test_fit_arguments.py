"""Arguments of the training loop that are of the wrong kind are refused before any step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from counting_trainer import Counting, Numbered, evaluation, fit

from maskwire.callbacks import EarlyStopping, StopTraining
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.writer import Writer
from maskwire.step_spans import step_spans


@pytest.mark.parametrize("function", [True, False], ids=["function", "number"])
@pytest.mark.parametrize(
    ("rate", "error", "words"),
    [
        ("fast", TypeError, "must be a number, or None for the server's schedule, got 'fast'"),
        (True, TypeError, "must be a number, or None for the server's schedule, got True"),
        ([0.1], TypeError, r"must be a number, or None for the server's schedule, got \[0.1\]"),
        (float("nan"), ValueError, "must be finite and at least 0, got nan"),
        (-0.5, ValueError, "must be finite and at least 0, got -0.5"),
        (float("inf"), ValueError, r"must be at most 3.4e\+38, the largest 32-bit number, got inf"),
        (1e308, ValueError, r"must be at most 3.4e\+38, the largest 32-bit number, got 1e\+308"),
        (10**400, ValueError, r"must be at most 3.4e\+38, the largest 32-bit number, got 1000"),
    ],
)
def test_a_learning_rate_that_is_none_is_refused_before_any_step(
    rate: Any, error: Any, words: str, function: bool
) -> None:
    trainer = Counting()
    name = r"learning_rate\(1\)" if function else "learning_rate"
    with pytest.raises(error, match=f"^{name} {words}"):
        fit(
            trainer, Numbered(), until_step=2, learning_rate=(lambda _: rate) if function else rate,
            progress=False,
        )  # fmt: skip
    assert trainer.batches == []


async def coroutine(*_: Any) -> None: ...


class CoroutineObject:
    async def __call__(self, *_: Any) -> None: ...


class EveryStep:
    def on_step(self, result: Any) -> None: ...


class CoroutineCallback:
    async def on_step(self, result: Any) -> None: ...


@pytest.mark.parametrize("function", [coroutine, functools.partial(coroutine, 1), CoroutineObject()])
@pytest.mark.parametrize("argument", ["on_step", "evaluate"])
def test_a_coroutine_function_is_refused_by_the_blocking_client(argument: str, function: Any) -> None:
    trainer, given = Counting(), {"evaluate": evaluation, "eval_every": 2, argument: function}
    with pytest.raises(TypeError, match=f"^{argument} is a coroutine function, .* the asyncio client"):
        fit(trainer, Numbered(), until_step=2, progress=False, **given)
    assert trainer.batches == []


def test_a_callback_with_a_coroutine_method_is_refused_by_the_blocking_client() -> None:
    trainer = Counting()
    words = r"^callbacks\[1\], a CoroutineCallback: on_step is a coroutine function, .* asyncio client"
    with pytest.raises(TypeError, match=words):
        fit(trainer, Numbered(), until_step=2, callbacks=[EveryStep(), CoroutineCallback()], progress=False)
    assert trainer.batches == []


def test_a_coroutine_that_a_plain_function_returns_is_refused_and_not_lost() -> None:
    with pytest.raises(
        TypeError, match="a callback returned a coroutine, which the blocking client does not"
    ):
        fit(Counting(), Numbered(), until_step=2, on_step=lambda result: coroutine(result), progress=False)


class Silent:
    """Progress output of one's own."""

    def update(self, *_: Any) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"on_step": 5}, TypeError, "^on_step must be a function, got 5"),
        ({"evaluate": 5, "eval_every": 1}, TypeError, "^evaluate must be a function, got 5"),
        ({"evaluate": 0, "eval_every": 1}, TypeError, "^evaluate must be a function, got 0"),
        (
            {"evaluate": evaluation},
            ValueError,
            "^evaluate needs eval_every, the number of steps between eval",
        ),
        ({"eval_every": 2}, ValueError, "^eval_every=2 needs evaluate, such as lambda trainer: trainer.eval"),
        ({"allow_changed_data": "no"}, TypeError, "^allow_changed_data must be True or False, got 'no'"),
        ({"allow_changed_data": 1}, TypeError, "^allow_changed_data must be True or False, got 1"),
        ({"save_best": "no"}, TypeError, "^save_best must be True or False, got 'no'"),
        ({"progress": "no"}, TypeError, "^progress must be True, False or an object with.* close, got 'no'"),
        ({"progress": None}, TypeError, "^progress must be True, False or an object with.* close, got None"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_before_any_step(
    given: dict[str, Any], error: Any, words: str
) -> None:
    trainer = Counting()
    with pytest.raises(error, match=words):
        fit(trainer, Numbered(), until_step=2, **{"progress": False, **given})
    assert trainer.batches == []
    assert fit(trainer, Numbered(), until_step=2, progress=Silent()).step == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EarlyStopping(min_delta="3"), "^min_delta must be a number of nats per token, got '3'"),  # type: ignore[arg-type]
        (lambda: EarlyStopping(min_delta=True), "^min_delta must be a number of nats per token, got True"),
        (lambda: StopTraining(checkpoint="no"), "^checkpoint must be True or False, got 'no'"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_a_callback_that_is_of_the_wrong_kind_is_refused(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: w.use_data({"a": 1}), r"^fingerprint must be a dict of strings, .*, got \{'a': 1\}"),
        (lambda w: w.use_data({1: "a"}), r"^fingerprint must be a dict of strings, .*, got \{1: 'a'\}"),
        (lambda w: w.use_data("abc"), "^fingerprint must be a dict of strings, .*, got 'abc'"),
        (lambda w: w.use_data({}, allow_changed="no"), "^allow_changed must be True or False, got 'no'"),
        (lambda w: w.use_tokenizer(5), "^tokenizer must be a string that names a tokenizer, .*, got 5"),
        (lambda w: w.open(takeover="no"), "^takeover must be True or False, got 'no'"),
    ],
)
def test_what_a_run_cannot_record_is_refused_before_anything_is_sent(call: Any, words: str) -> None:
    writer = Writer("127.0.0.1:1", RetryPolicy(), print, lambda: 0.0, None, 4, step_spans("127.0.0.1:1"))
    with pytest.raises(TypeError, match=words):
        next(call(writer))
