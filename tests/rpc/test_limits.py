"""Servers with small limits: evaluations and generations take several calls, and differ in nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.errors import InvalidRequestError, MaskwireError, RequestError, StepMovedError
from maskwire.results import EvalResult, GenerateResult

WHAT = {"objective__self_cond": "true", "objective__critic": "token", "model__max_seq_len": "32"}
SMALL = {
    "serve__max_batch_tokens": "64",  # two rows of 32
    "serve__max_draws": "4",
    "serve__max_read_tokens": "8192",  # two rows of 32 over 32 passes that count thrice
    "serve__max_message_bytes": "65536",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The default limits."""
    server = ServerProcess(tmp_path_factory.mktemp("large"), **WHAT).start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same model behind small limits."""
    server = ServerProcess(tmp_path_factory.mktemp("small"), **WHAT, **SMALL).start()
    yield server
    assert server.stop() == 0


def blocking(server: ServerProcess, method: str, *arguments: Any, **options: Any) -> Any:
    with maskwire.attach(server.address) as client:
        found = getattr(client, method)(*arguments, **options)
        return list(found) if method == "generate_steps" else found


def awaited(server: ServerProcess, method: str, *arguments: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with maskwire.aio.attach(server.address) as client:
            found = getattr(client, method)(*arguments, **options)
            return [each async for each in found] if method == "generate_steps" else await found

    return asyncio.run(run())


BOTH_CLIENTS = pytest.mark.parametrize("ask", [blocking, awaited])


def in_turn(options: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Alternate the clients over the options: both share the code that splits the work."""
    cases = list(zip(cycle((blocking, awaited)), options, strict=False))
    return pytest.mark.parametrize(("ask", "options"), cases, ids=[str(each) for each in options])


def rows(count: int = 9, longest: int = 32) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 16, longest if n == 4 else rng.integers(1, longest)) for n in range(count)]


def with_gaps(count: int = 9) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    found = [np.where(rng.random(len(row)) < 0.7, 16, row) for row in rows(count)]
    found[2] = np.arange(5)  # has nothing to sample
    return found


def same(ours: EvalResult, theirs: EvalResult) -> None:
    assert [(row.row_id, row.tokens) for row in ours.rows] == [
        (row.row_id, row.tokens) for row in theirs.rows
    ]
    assert [row.nats for row in ours.rows] == pytest.approx([row.nats for row in theirs.rows], rel=1e-5)
    assert (ours.tokens, ours.draws) == (theirs.tokens, theirs.draws)
    assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-5)


def alike(ours: GenerateResult, theirs: GenerateResult) -> None:
    assert type(ours.tokens) is type(theirs.tokens)
    assert [row.tolist() for row in ours.tokens] == [row.tolist() for row in theirs.tokens]
    for name in ("unmasking_step", "done", "still_masked", "step", "ema_weights"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_limits_are_told(small: ServerProcess) -> None:
    with maskwire.connect(small.address) as trainer:
        assert trainer.limits == trainer.status().limits
        assert (trainer.limits.max_read_tokens, trainer.limits.max_batch_tokens) == (8192, 64)
        assert trainer.model.self_cond


@in_turn([
    {"draws": 4},
    {"draws": 3, "seed": 5, "batch_size": 7, "row_ids": list(range(20, 29))},
    {"draws": 1, "only_train_generator": True},
    {"estimator": "chain_rule"},
    {"estimator": "chain_rule", "chain_order": "random", "draws": 2},
])  # fmt: skip
def test_an_evaluation_is_the_same_whatever_one_call_takes(
    large: ServerProcess, small: ServerProcess, ask: Any, options: dict[str, Any]
) -> None:
    same(ask(small, "evaluate", rows(), **options), ask(large, "evaluate", rows(), **options))


@BOTH_CLIENTS
def test_the_default_draws_are_as_many_as_the_server_takes(
    large: ServerProcess, small: ServerProcess, ask: Any
) -> None:
    assert ask(small, "eval_loss", rows(1)).draws == 4
    same(ask(small, "evaluate", rows()), ask(large, "evaluate", rows(), draws=4))
    assert ask(large, "eval_loss", rows(1)).draws == 16


@in_turn([
    {},
    {"seed": 7, "temperature": 0.7, "top_k": 5},
    {"steps": 3, "order": "confidence", "remasking": True, "choice_temperature": 1.0},
    {"order": "critic", "steps": 5, "row_seeds": list(range(40, 49))},
    {"self_cond_mode": "carry", "raw_weights": True},
    {"start_temperature": 2.0, "filter_thres": 0.5, "top_p": 0.9},
])  # fmt: skip
def test_a_generation_is_the_same_whatever_one_call_takes(
    large: ServerProcess, small: ServerProcess, ask: Any, options: dict[str, Any]
) -> None:
    prompts = with_gaps()
    alike(ask(small, "generate", prompts, **options), ask(large, "generate", prompts, **options))
    alike(ask(small, "generate", count=9, **options), ask(large, "generate", count=9, **options))


@BOTH_CLIENTS
def test_prompts_given_by_a_mask_and_padding_stay_what_they_are(
    large: ServerProcess, small: ServerProcess, ask: Any
) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 16, (9, 20))
    options = {"lengths": rng.integers(10, 21, 9), "prompt_mask": rng.random((9, 20)) < 0.5, "count": 8}
    alike(ask(small, "generate", ids, **options), ask(large, "generate", ids, **options))


def test_ids_that_are_padding_stay_padding(serve: Callable[..., ServerProcess]) -> None:
    ids = np.random.default_rng(4).integers(1, 17, (6, 20))
    ids[::2, 15:] = 0
    found = []
    for name, limit in (("large", "1024"), ("small", "60")):
        server = serve(name, model__pad_id="0", serve__max_batch_tokens=limit)
        found.append(blocking(server, "generate", ids))
    alike(*found)
    assert not found[1].tokens[::2, 15:].any()


@BOTH_CLIENTS
def test_each_pass_of_a_generation_over_several_calls_shows_all_rows(small: ServerProcess, ask: Any) -> None:
    prompts = with_gaps(5)
    whole = ask(small, "generate", prompts)
    states = ask(small, "generate_steps", prompts)
    assert [state.done for state in states].count(True) == 1
    alike(states[-1], whole)
    for state in states:
        masked = [int((row == 16).sum()) for row in state.tokens]
        assert masked == list(state.still_masked)
    left = [sum(state.still_masked) for state in states]
    assert left == sorted(left, reverse=True)
    for given, row in zip(prompts, whole.tokens, strict=True):
        assert (row[given != 16] == given[given != 16]).all()


def test_rows_of_several_calls_are_of_one_step(serve: Callable[..., ServerProcess]) -> None:
    server = serve(serve__max_batch_tokens="32")
    with maskwire.connect(server.address) as trainer:
        states = trainer.generate_steps(count=2, length=32)
        next(states)
        trainer.train_step([[1, 2, 3]])
        with pytest.raises(StepMovedError, match=r"step 0 to step 1 .* serve.max_read_tokens"):
            list(states)


@BOTH_CLIENTS
def test_messages_stay_within_the_servers(serve: Callable[..., ServerProcess], ask: Any) -> None:
    server = serve(model__max_seq_len="100000", serve__max_message_bytes="65536")
    # Together 150,000 bytes of ids, and a bit a position of the mask.
    ids = np.random.default_rng(5).integers(0, 16, (150, 1000))
    prompts = np.zeros((150, 1000), dtype=bool)
    prompts[:, 2:] = True
    found = ask(server, "evaluate", ids, prompt_mask=prompts, draws=1, batch_size=150)
    assert (found.tokens, len(found.rows)) == (300, 150)
    made = ask(server, "generate", ids, prompt_mask=prompts, steps=1)
    assert (made.tokens[:, 2:] == ids[:, 2:]).all()
    # A row that is too long by itself.
    long = np.zeros((2, 70_000), dtype=int)
    for call, arguments in (("evaluate", long), ("generate", np.where(np.arange(70_000) < 2, 16, long))):
        with pytest.raises(
            RequestError, match=r"row 0 .* most 65,536.*shorter.*raise serve.max_message_bytes"
        ):
            ask(server, call, arguments)
    with pytest.raises(RequestError, match=r"70\d\d\d vs. 65536.*serve.max_message_bytes"):
        ask(server, "eval_loss", long[:1])


@BOTH_CLIENTS
@pytest.mark.parametrize(("method", "arguments", "options", "words"), [
    ("evaluate", [[0] * 32] * 2, {"estimator": "chain_rule", "chain_order": "random", "draws": 4},
     r"at most 8192 positions .*\(serve.max_read_tokens\), got 16384"),
    ("evaluate", [[0] * 32] * 2, {"draws": 5},
     r"draws must be 1 to 4 \(serve.max_draws\), or 0 for the default of 4, got 5"),
    ("generate", [[16] * 33, [16] * 3, [16] * 32], {}, r"at most 32 tokens \(max_seq_len\), got 33"),
    ("generate", None, {"count": 3, "length": 2**30}, r"length must be 1 to 32 \(max_seq_len\)"),
    ("generate", None, {"count": 3, "length": -1}, r"length must be 1 to 32 .* got -1"),
    ("generate", [[3], [4]], {}, "every position is given"),
], ids=str)  # fmt: skip
def test_a_row_that_is_too_much_by_itself_is_told_the_limit(
    small: ServerProcess, ask: Any, method: str, arguments: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        ask(small, method, arguments, **options)


@BOTH_CLIENTS
def test_a_row_of_more_passes_than_a_generation_may_have_is_told_so_first(
    serve: Callable[..., ServerProcess], ask: Any
) -> None:
    server = serve(serve__max_generation_steps="8", serve__max_read_tokens="1024")
    words = r"steps must be 1 to 8 \(serve.max_generation_steps\): one position per step would take 32 steps;"
    with pytest.raises(InvalidRequestError, match=words):
        ask(server, "generate", count=3)
    words = (
        r"count: .* at most 1024 .*\(serve.max_read_tokens\), got 1280 for 1 x 32 tokens with 20 unmasking"
    )
    server = serve("b", serve__max_read_tokens="1024")
    seen: list[Any] = []
    with pytest.raises(InvalidRequestError, match=words):
        seen += ask(server, "generate_steps", [[16] * 4 + [1] * 28, [16] * 20 + [1] * 12])
    assert not seen


@BOTH_CLIENTS
def test_seeds_that_do_not_fit_the_rows_are_refused_before_any_call(small: ServerProcess, ask: Any) -> None:
    for options, words in (
        ({"row_seeds": [1]}, r"one seed per row \(9 rows\)"),
        ({"seed": 2**63 - 3}, "seeds of all 9 rows"),
    ):
        with pytest.raises((ValueError, MaskwireError), match=words):
            ask(small, "generate", count=9, **options)


def test_what_was_sent_comes_back_shortened_over_the_wire(small: ServerProcess, stub: Any) -> None:
    import grpc

    from maskwire.v1 import training_service_pb2 as pb

    service = stub(small)
    for call in (
        lambda: service.ListCheckpoints(pb.ListCheckpointsRequest(page_token="x" * 60_000)),
        lambda: service.CloseSession(pb.CloseSessionRequest(session=pb.SessionRef(run_id="r" * 60_000))),
        lambda: service.Checkpoint(pb.CheckpointRequest(name="step-" + "1" * 60_000)),
        lambda: list(
            service.DownloadCheckpoint(pb.DownloadCheckpointRequest(name="step-000000000", file="f" * 60_000))
        ),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND
        )  # fmt: skip


def run(*arguments: str, code: int = 0) -> str:
    done = fork_server.run([sys.executable, "-m", "maskwire", *arguments], text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_commands_need_not_know_the_limits(
    large: ServerProcess, small: ServerProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, row in enumerate(rows(6)):
        (folder / f"{number}.txt").write_bytes(row.astype(np.uint8).tobytes() * 3)
    at = ["--target", small.address]
    for options in ([], ["--chain-rule"], ["--batch-size", "50"], ["--rows", "8"]):
        ours = json.loads(run("eval", str(folder), *options, "--json", *at))
        more = [*options, *([] if "--chain-rule" in options else ["--draws", "4"])]
        theirs = json.loads(run("eval", str(folder), *more, "--json", "--target", large.address))
        assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)
        assert (ours["tokens"], ours["draws"]) == (theirs["tokens"], theirs["draws"])
    ours, theirs = (
        json.loads(run("generate", "--count", "7", "--json", "--target", server.address))
        for server in (small, large)
    )
    assert ours["tokens"] == theirs["tokens"]


def test_evaluations_of_a_training_job_keep_to_the_limits(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = serve(**WHAT, **SMALL)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_bytes(bytes(n % 16 for n in range(100 + number)))
    metrics = tmp_path / "metrics.jsonl"
    run(
        "train", str(folder), "--until-step", "4", "--batch-size", "2", "--eval-every", "2",
        "--held-out", "0.3", "--eval-rows", "9",
        "--metrics", str(metrics), "--json", "--target", server.address,
    )  # fmt: skip
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_bits_per_token" in line] == [2, 4]


def test_a_cpu_bounds_a_read_to_minutes_unless_the_setting_says_otherwise(
    shared: ServerProcess, serve: Callable[..., ServerProcess]
) -> None:
    with maskwire.attach(shared.address) as client:
        assert client.status().limits.max_read_tokens == 2**22
    with maskwire.attach(serve("set", serve__max_read_tokens="5000000").address) as client:
        assert client.status().limits.max_read_tokens == 5_000_000
