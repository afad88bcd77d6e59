"""Wrong arguments are refused with advice, by both clients alike."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.protocol import codec
from maskwire.protocol.evaluation_plan import EvaluationPlan
from maskwire.protocol.option_types import EvalOptions, GenerateOptions, StepOptions
from maskwire.protocol.token_batch import encode_batch

Serve = Callable[..., ServerProcess]
TOKENS = np.arange(8).reshape(2, 4)
# The counter trainer injects faults for smaller ids.
DATA = maskwire.TokenData([np.arange(10, 16)], length=4, batch_size=2)


class DataLoader:
    """The attributes by which a torch DataLoader is recognised."""

    batch_size = 2

    def __init__(self, dataset: Any = None) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return iter([TOKENS])

    def __len__(self) -> int:
        return 1


def test_the_known_options_are_those_of_the_typed_dicts() -> None:
    assert set(codec.STEP_OPTIONS) == set(StepOptions.__annotations__)
    assert set(codec.EVAL_OPTIONS) == set(EvalOptions.__annotations__)
    own = {"count", "order", "self_cond_mode"}
    assert set(codec.GENERATE_OPTIONS) | own == set(GenerateOptions.__annotations__)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "attention_mask": (
        lambda t: t.train_step(TOKENS, attention_mask=TOKENS),
        r"train_step\(\) has no argument 'attention_mask'.*lengths=.*prompt_mask=",
    ),
    "a typo": (lambda t: t.train_step(TOKENS, learing_rate=1.0), "did you mean 'learning_rate'"),
    "lr": (lambda t: t.submit(TOKENS, lr=1.0), "did you mean 'learning_rate'"),
    "what the client fills in": (lambda t: t.train_step(TOKENS, request_id="a"), "has no argument"),
    "eval": (lambda t: t.eval_loss(TOKENS, num_draws=2), r"eval_loss\(\).*did you mean 'draws'"),
    "evaluate": (lambda t: t.evaluate(TOKENS, draw=2), r"evaluate\(\).*did you mean 'draws'"),
    "evaluate's own": (lambda t: t.evaluate(DATA, row=2), r"evaluate\(\).*did you mean 'rows'"),
    "submit": (lambda t: t.submit(TOKENS, stp=1), r"submit\(\).*did you mean 'step'"),
    "generate": (lambda t: t.generate(max_new_tokens=4), r"generate\(\).*did you mean 'length'"),
    "nothing near": (lambda t: t.generate(xyzzy=4), "the call takes prompts, lengths, prompt_mask"),
    "checkpoint": (lambda t: t.checkpoint("a", lables={}), r"checkpoint\(\).*did you mean 'labels'"),
    "download": (lambda t: t.download("a", "b", weigths=True), "did you mean 'weights'"),
    "fit": (lambda t: t.fit(DATA, until_step=1, checkpoint_evry=1), r"fit\(\).*'checkpoint_every'"),
    "fit with epochs": (lambda t: t.fit(DATA, until_step=1, epochs=1), "did you mean 'until_step'"),
    "a DataLoader": (lambda t: t.fit(DataLoader(), until_step=1), "got DataLoader.*maskwire.TokenData"),
    "an iterator": (lambda t: t.fit(iter([TOKENS]), until_step=1), "an iterator cannot resume"),
    "a path": (lambda t: t.fit("data/", until_step=1), r"maskwire\.open_data\('data/'"),
    "a Path": (lambda t: t.fit(Path("data"), until_step=1), r"maskwire\.open_data\('data'"),
    "an array": (lambda t: t.fit(TOKENS, until_step=1), "got ndarray: pass its documents"),
    "evaluate a DataLoader": (lambda t: t.evaluate(DataLoader()), "data must be rows.*got DataLoader"),
    "train on a DataLoader": (lambda t: t.train_step(DataLoader()), "tokens must be rows.*got DataLoader"),
    "a tokenizer's dict": (lambda t: t.train_step({"input_ids": TOKENS}), "pass its 'input_ids'"),
    "text": (lambda t: t.train_step("some text"), r"got str: encode the text"),
    "checkpoint's name": (lambda t: t.checkpoint(5), "^name must be a str, got 5"),
    "a label": (
        lambda t: t.checkpoint("a", labels={"seed": 5}),
        r"^the label 'seed' must be a str, such as str\(5\), got 5",
    ),
    "a label's name": (lambda t: t.checkpoint("a", labels={5: "a"}), "^the name of a label must be a str"),
    "labels": (lambda t: t.checkpoint("a", labels=["a"]), "^labels must map str to str"),
    "a score": (lambda t: t.checkpoint("a", score="low"), "^score must be a number, or None, got 'low'"),
    "restore": (lambda t: t.restore(5), "^name must be a str, got 5"),
    "restore None": (lambda t: t.restore(None), "^name must be a str, got None"),
    "delete": (lambda t: t.delete(5), "^name must be a str, got 5"),
    "a download's name": (lambda t: t.download(5, "b"), "^name must be a str, got 5"),
    "a download's progress": (
        lambda t: t.download("a", "b", on_progress=5),
        "^on_progress must be a function, got 5",
    ),
    "a field's type": (lambda t: t.eval_loss(TOKENS, draws="four"), "draws cannot be 'four'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_with_a_suggestion(shared: ServerProcess, case: str) -> None:
    call, words = WRONG[case]
    with maskwire.connect(shared.address) as trainer, pytest.raises(TypeError, match=words):
        call(trainer)

    async def main() -> None:
        async with await maskwire.aio.connect(shared.address) as trainer:
            with pytest.raises(TypeError, match=words):
                await call(trainer)

    asyncio.run(main())


WRONG_NUMBERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "checkpoint_every": (
        lambda t: t.fit(DATA, until_step=9, checkpoint_every=-5),
        "checkpoint_every must be at least 1, or None for never, got -5",
    ),
    "eval_every": (
        lambda t: t.fit(DATA, until_step=9, evaluate=len, eval_every=-3),
        "eval_every must be at least 1",
    ),
    "until_step": (lambda t: t.fit(DATA, until_step=-1), "until_step must be at least 0, got -1"),
    "step": (lambda t: t.submit(TOKENS, step=0), "^step must be at least 1, got 0"),
    "a restore's step": (
        lambda t: t.restore("a", expected_step="x"),
        "^expected_step must be a whole number of at least 0, or None, got 'x'",
    ),
    "a checkpoint's step": (
        lambda t: t.checkpoint("a", expected_step=-1),
        "^expected_step must be at least 0, or None, got -1",
    ),
    "a step of a float": (lambda t: t.submit(TOKENS, step=1.0), "^step must be a whole number.*got 1.0"),
    "batch_size": (lambda t: t.evaluate(TOKENS, batch_size=1.5), "batch_size must be a whole number"),
    "rows": (lambda t: t.evaluate(DATA, rows=True), "^rows must be a whole number.*got True"),
    "text_bytes": (lambda t: t.evaluate(TOKENS, text_bytes=-8), "text_bytes must be at least 1.*got -8"),
}


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_a_number_out_of_range_is_refused_with_the_range(shared: ServerProcess, case: str) -> None:
    call, words = WRONG_NUMBERS[case]
    with maskwire.connect(shared.address) as trainer, pytest.raises(ValueError, match=words):
        call(trainer)

    async def main() -> None:
        async with await maskwire.aio.connect(shared.address) as trainer:
            with pytest.raises(ValueError, match=words):
                await call(trainer)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["name", "takeover", "window", "on_takeover"])
def test_attach_refuses_arguments_of_connect(name: str) -> None:
    for package in (maskwire, maskwire.aio):
        words = rf"attach\(\) has no argument '{name}': attach\(\) opens no session; .* or use connect\(\)"
        with pytest.raises(TypeError, match=words):
            package.attach("127.0.0.1:1", **{name: 1})


@pytest.mark.parametrize(
    ("tokens", "shape"), [([], r"\[0\]"), ([[]], r"\[1, 0\]"), (np.zeros((0, 4), int), r"\[0, 4\]")]
)
def test_an_empty_batch_is_refused(tokens: Any, shape: str) -> None:
    for request in (lambda: codec.step_request("id", tokens), lambda: codec.eval_request(tokens)):
        with pytest.raises(ValueError, match=f"at least one row and one column, got an empty batch {shape}"):
            request()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1] * 4, [1, 0]], r"prompt_mask: row 0 must have type bool.*\[4\].*got int64 and \[4\]"),
        ([[True] * 4, [1, 0]], r"prompt_mask: row 1 must have type bool.*\[2\].*got int64 and \[2\]"),
        ([[True] * 4, [True]], r"prompt_mask: row 1 must have type bool.*\[2\].*got bool and \[1\]"),
        (np.ones((2, 4)), r"prompt_mask: row 0 must have type bool.*\[4\].*got float64 and \[4\]"),
    ],
)
def test_a_wrong_mask_is_named_by_its_row(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationPlan([[1, 2, 3, 4], [5, 6]], rows=None, batch_size=None, prompt_mask=mask)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_that_is_not_a_positive_integer_is_refused(window: Any) -> None:
    with pytest.raises(ValueError, match=f"window must be .*at least 1, got {window}"):
        maskwire.connect("127.0.0.1:1", window=window)
    with pytest.raises(ValueError, match=f"window must be .*at least 1, got {window}"):
        asyncio.run(maskwire.aio.connect("127.0.0.1:1", window=window))


@pytest.mark.parametrize(
    "call",
    [
        lambda: codec.generate_request(steps=True),
        lambda: codec.generate_request(count=True),
        lambda: codec.generate_request(temperature=False),
        lambda: codec.eval_request(TOKENS, draws=True),
        lambda: codec.eval_request(TOKENS, draws=2.5),
        lambda: codec.step_request("id", TOKENS, learning_rate=True),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_name(call: Callable[[], Any]) -> None:
    with pytest.raises(
        TypeError,
        match=r"(steps|count|temperature|draws|learning_rate) (must be a number, got|cannot be 2.5)",
    ):
        call()


@pytest.mark.parametrize(
    ("option", "words"),
    [("time_out", "did you mean 'timeout'"), ("secure", "did you mean 'tls'"), ("tokn", "'token'")],
)
def test_a_wrong_argument_of_connect_is_refused(option: str, words: str) -> None:
    for package in (maskwire, maskwire.aio):
        with pytest.raises(TypeError, match=words):
            package.attach("127.0.0.1:1", **{option: 1})
    with pytest.raises(TypeError, match=words):
        maskwire.connect("127.0.0.1:1", **{option: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=words):
        asyncio.run(maskwire.aio.connect("127.0.0.1:1", **{option: 1}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": 5}, "^name must be a str, got 5"),
        ({"on_wait": 5}, "^on_wait must be a function, got 5"),
        ({"on_takeover": 5}, "^on_takeover must be a function, got 5"),
        ({"timeout": "x"}, "^timeout must be a number of seconds, got 'x'"),
        ({"retry_for": None}, "^retry_for must be a number of seconds, got None"),
        ({"tls": "no"}, "^tls must be True or False, got 'no'"),
        ({"allow_insecure": "no"}, "^allow_insecure must be True or False, got 'no'"),
        ({"ca": 5}, "^ca must be the path of a file, got 5"),
        ({"token_file": 5}, "^token_file must be the path of a file, got 5"),
        ({"token": 5}, "^token must be a str, got 5"),
        ({"server_name": 5, "tls": True}, "^server_name must be a str, got 5"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_by_connect(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        maskwire.connect("127.0.0.1:1", **arguments)
    with pytest.raises(TypeError, match=words):
        asyncio.run(maskwire.aio.connect("127.0.0.1:1", **arguments))
    if not {"name", "on_takeover"} & arguments.keys():
        for package in (maskwire, maskwire.aio):
            with pytest.raises(TypeError, match=words):
                package.attach("127.0.0.1:1", **arguments)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([9, 1], "lengths must be 1 to 4, the columns of tokens, got 9 for row 0"),
        ([4, 0], "got 0 for row 1"),
        ([4, -1], "got -1 for row 1"),
        ([2**32 + 3, 1], "got 4294967299 for row 0"),
        ([1, 2, 3], r"one length per row \(2 rows\)"),
    ],
)
def test_lengths_outside_the_columns_are_refused(lengths: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_batch(TOKENS, lengths=lengths)


def test_a_ragged_mask_encodes_like_a_padded_one() -> None:
    ragged = encode_batch([[1, 2, 3], [4]], prompt_mask=[[True, False, True], [False]])
    even = encode_batch([[1, 2, 3], [4]], prompt_mask=np.array([[1, 0, 1], [0, 0, 0]], dtype=bool))
    padded = encode_batch([[1, 2, 3], [4, 0, 0]], lengths=[3, 1], prompt_mask=[[True, False, True], [False]])
    arrays = encode_batch([[1, 2, 3], [4]], prompt_mask=[np.array([True, False, True]), np.array([False])])
    assert ragged == even == padded == arrays


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[True, False], [False]], r"row 0 must have type bool and shape \[3\], .* got bool and \[2\]"),
        ([[True, False, True], [False, True]], r"row 1 must have type bool and shape \[1\]"),
        ([[1, 0, 1], [0]], r"row 0 must have type bool and shape \[3\].*got int64"),
        ([[True, False, True], [False], [False]], r"as many rows as tokens \(2\), got 3"),
    ],
)
def test_a_ragged_mask_that_does_not_fit_is_refused_by_row(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_batch([[1, 2, 3], [4]], prompt_mask=mask)


def test_ragged_masks_work_in_evaluation_and_generation(shared: ServerProcess) -> None:
    mask = [[True, False, False], [False]]
    with maskwire.attach(shared.address) as client:
        found = client.eval_loss([[1, 2, 3], [4]], prompt_mask=mask, draws=2)
        assert [row.tokens for row in found.rows] == [2, 1]
        assert client.evaluate([[1, 2, 3], [4]], prompt_mask=mask, draws=2).tokens == 3
        first, second = client.generate([[1, 2, 3], [4]], prompt_mask=mask).tokens
        assert (first[0], len(first), len(second)) == (1, 3, 1)


def ended(*_: Any) -> Any:
    return next(iter(()))


class Ended:
    batch = ended


BY_FIT: dict[str, Callable[[Any], Any]] = {
    "on_step": lambda t: t.fit(DATA, until_step=1000, progress=False, on_step=ended),
    "evaluate": lambda t: t.fit(DATA, until_step=1000, progress=False, evaluate=ended, eval_every=1),
    "data.batch": lambda t: t.fit(Ended(), until_step=1000, progress=False),
    "a callback": lambda t: t.evaluate(TOKENS, on_progress=ended, draws=2),
}


@pytest.mark.parametrize("name", BY_FIT)
def test_stop_iteration_from_a_callback_is_an_error_that_names_it(serve: Serve, name: str) -> None:
    address, call = serve().address, BY_FIT[name]
    words = f"{name} raised StopIteration.*maskwire.StopTraining"
    with maskwire.connect(address) as trainer, pytest.raises(RuntimeError, match=words):
        call(trainer)

    async def main() -> None:
        async with await maskwire.aio.connect(address) as trainer:
            with pytest.raises(RuntimeError, match=words):
                await call(trainer)

    asyncio.run(main())


def test_stop_training_ends_fit_early(serve: Serve) -> None:
    server = serve(seconds=0)
    seen: list[int] = []

    def stop_at(step: int) -> Callable[[Any], None]:
        def on_step(result: Any) -> None:
            seen.append(result.step)
            if result.step >= step:
                raise maskwire.StopTraining

        return on_step

    with maskwire.connect(server.address) as trainer:
        found = trainer.fit(DATA, until_step=100, progress=False, on_step=stop_at(3))
        assert found.stopped
        assert not found.interrupted
        assert seen == [1, 2, 3]
        assert found.step == trainer.step < 3 + 4 + 1, "steps in flight were applied"
        assert not trainer.fit(DATA, until_step=trainer.step + 1, progress=False).stopped

    async def main() -> None:
        async def evaluate(_: Any) -> None:
            raise maskwire.StopTraining

        async with await maskwire.aio.connect(server.address) as trainer:
            first = trainer.step + 1
            found = await trainer.fit(
                DATA, until_step=100, progress=False, evaluate=evaluate, eval_every=first
            )
            assert (found.stopped, found.step) == (True, first)

    asyncio.run(main())


@pytest.mark.parametrize("asyncio_too", [False, True])
def test_a_learning_rate_of_zero_is_reported_once(
    serve: Serve, caplog: pytest.LogCaptureFixture, asyncio_too: bool
) -> None:
    address = serve(
        optimizer__schedule="cosine", optimizer__total_steps="2", optimizer__warmup_steps="1"
    ).address

    async def main() -> None:
        async with await maskwire.aio.connect(address) as trainer:
            await trainer.train_step(TOKENS)
            await trainer.train_step(TOKENS)
            assert not caplog.records
            for _ in range(3):
                await trainer.train_step(TOKENS)

    with caplog.at_level(logging.WARNING):
        if asyncio_too:
            asyncio.run(main())
        else:
            with maskwire.connect(address) as trainer:
                trainer.train_step(TOKENS)
                trainer.train_step(TOKENS, learning_rate=0.0)
                trainer.train_step(TOKENS)
                assert not caplog.records, (
                    "not for the last step of the schedule, nor for an explicit learning rate"
                )
                for _ in range(3):
                    trainer.train_step(TOKENS)
    (record,) = caplog.records
    assert "the learning rate is 0" in record.getMessage()
    assert "optimizer.total_steps" in record.getMessage()
