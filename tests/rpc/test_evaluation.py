"""Evaluations over the wire: whole data sets over many calls, and the chain rule."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.data.token_data import TokenData
from maskwire.errors import InvalidRequestError, StepMovedError
from maskwire.protocol.evaluation_plan import combine
from maskwire.results import EvalResult


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a critic, self-conditioning and a loss that is no bound, some steps in."""
    started = ServerProcess(
        tmp_path_factory.mktemp("critic"),
        objective__critic="token",
        objective__self_cond="true",
        objective__weighting="masked_mean",
        objective__schedule="cosine",
        objective__critic_loss_weight="0.3",
        optimizer__ema_decay="0.9",
    ).start()
    with maskwire.connect(started.address) as trainer:
        for seed in range(5):
            trainer.train_step(np.random.default_rng(seed).integers(0, 16, (8, 12)), learning_rate=3e-3)
    yield started
    assert started.stop() == 0


def ragged(count: int = 13, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 16, rng.integers(1, 20)).astype(np.uint8) for _ in range(count)]


def close(ours: Any, theirs: Any, *, rel: float = 1e-5, abs: float = 1e-9) -> bool:
    """Absent in both, or as near as fp32 in another order of addition comes."""
    return ours is None if theirs is None else ours == pytest.approx(theirs, rel=rel, abs=abs)


def same(found: EvalResult, expected: EvalResult) -> None:
    """Every figure agrees."""
    assert [row.row_id for row in found.rows] == [row.row_id for row in expected.rows]
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert close(ours.nats, theirs.nats)
        assert ours.tokens == theirs.tokens
        assert not ours.tokens or close(ours.half_difference, theirs.half_difference, abs=1e-4)
    for name in ("tokens", "draws", "step", "digest", "ema_weights"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("nats_per_token", "bits_per_token", "perplexity", "accuracy", "critic_accuracy"):
        assert close(getattr(found, name), getattr(expected, name)), name
    for name in ("standard_error", "monte_carlo_error", "bits_per_byte"):
        assert close(getattr(found, name), getattr(expected, name), rel=1e-4), name
    for name in ("loss", "generator_loss", "critic_loss"):
        assert close(getattr(found.losses, name), getattr(expected.losses, name)), name
    for ours, theirs in zip(found.by_masked_fraction, expected.by_masked_fraction, strict=True):
        for a, b in zip(dataclasses.astuple(ours), dataclasses.astuple(theirs), strict=True):
            assert close(a, b)


@pytest.mark.parametrize("options", [
    {"draws": 5, "seed": 3},
    {"draws": 1, "raw_weights": True, "generator_sample_temperature": 0.5},
    {"draws": 2, "only_train_critic": True},
    {"draws": 2, "only_train_generator": True},
    {"estimator": "chain_rule"},
    {"estimator": "chain_rule", "chain_order": "random", "draws": 3, "seed": 1},
], ids=str)  # fmt: skip
def test_a_data_set_over_many_calls_has_the_figures_of_one_call(
    server: ServerProcess, options: dict[str, Any]
) -> None:
    rows = ragged()
    with maskwire.attach(server.address) as client:
        whole = client.eval_loss(rows, text_bytes=300, **options)
        for batch_size in (1, 4, None):
            same(client.evaluate(rows, batch_size=batch_size, text_bytes=300, **options), whole)
        # Shuffled, and padded to another width.
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        padded = np.zeros((len(rows), 30), dtype=np.int64)
        for place, row in enumerate(order):
            padded[place, : rows[row].size] = rows[row]
        lengths = [rows[row].size for row in order]
        shuffled = client.evaluate(
            padded, lengths=lengths, row_ids=order, batch_size=3, text_bytes=300, **options
        )
        same(shuffled, whole)


def test_both_clients_evaluate_alike_and_say_how_far_they_are(server: ServerProcess) -> None:
    rows, told = ragged(), []

    def tell(done: int, of: int, nats: float) -> None:
        told.append((done, of, nats))

    async def awaited() -> EvalResult:
        async with maskwire.aio.attach(server.address) as client:
            return await client.evaluate(rows, batch_size=5, draws=2, on_progress=tell)

    found = asyncio.run(awaited())
    assert [done for done, _, _ in told] == [5, 10, 13]
    assert told[-1][1:] == (13, pytest.approx(found.nats_per_token))
    with maskwire.connect(server.address) as trainer:
        assert trainer.evaluate(rows, batch_size=5, draws=2) == found


def test_results_of_parts_combine_whoever_made_them(server: ServerProcess) -> None:
    rows = ragged()
    with maskwire.attach(server.address) as client:
        whole = client.eval_loss(rows, draws=4)
        parts = [
            client.eval_loss(rows[start:stop], row_ids=range(start, stop), draws=4)
            for start, stop in ((9, 13), (0, 1), (1, 9))
        ]
        same(combine(parts), whole)
        with pytest.raises(ValueError, match="different draws cannot be combined"):
            combine([whole, client.eval_loss(rows, draws=3)])
        with pytest.raises(ValueError, match="at least one result, got none"):
            combine([])


def test_every_token_of_a_data_set_is_evaluated_once(server: ServerProcess) -> None:
    documents = [np.arange(size) % 16 for size in (3, 40, 16, 17, 1)]
    data = TokenData(documents, length=16, batch_size=1, bytes_per_token=2.0)
    tiles = data.whole()
    assert np.array_equal(np.concatenate(list(tiles)), np.concatenate(documents))
    assert [len(row) for row in tiles] == [3, 16, 16, 8, 16, 16, 1, 1]
    assert np.array_equal(tiles[-1], documents[-1])
    with maskwire.attach(server.address) as client:
        found = client.evaluate(data, draws=2)
        assert (found.tokens, len(found.rows)) == (77, 8)
        assert found.bits_per_byte == pytest.approx(found.bits_per_token / 2)
        same(client.evaluate(data, draws=2, batch_size=3), found)
        assert len(client.evaluate(data, rows=5, draws=2).rows) == 5


def test_rows_that_are_prompts_throughout_are_passed_over(server: ServerProcess) -> None:
    rows = np.random.default_rng(2).integers(0, 16, (6, 8))
    prompts = np.zeros((6, 8), dtype=bool)
    prompts[1] = prompts[4] = True
    prompts[2, :5] = True
    with maskwire.attach(server.address) as client:
        whole = client.eval_loss(rows, prompt_mask=prompts, draws=3, text_bytes=30)
        assert [row.tokens for row in whole.rows] == [8, 0, 3, 8, 0, 8]
        same(client.evaluate(rows, prompt_mask=prompts, draws=3, batch_size=1, text_bytes=30), whole)
        with pytest.raises(ValueError, match="no row has a token outside its prompt"):
            client.evaluate(rows, prompt_mask=np.ones((6, 8), dtype=bool))


def test_training_in_the_middle_of_an_evaluation_is_found(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:

        def train(done: int, rows: int, nats: float) -> None:
            if done == 2:
                trainer.train_step([[1, 2, 3]])

        with pytest.raises(StepMovedError, match="step 0 to step 1"):
            trainer.evaluate(ragged(6), batch_size=2, on_progress=train, draws=1)


@pytest.mark.parametrize(("options", "words"), [
    ({"estimator": "chain_rule", "draws": 2}, "there is only one such order"),
    ({"estimator": "chain_rule", "only_train_critic": True}, "uses no critic"),
    ({"chain_order": "random"}, "chain_order needs ESTIMATOR_CHAIN_RULE"),
], ids=str)  # fmt: skip
def test_what_a_chain_rule_cannot_be_told_is_refused_by_name(
    server: ServerProcess, options: dict[str, Any], words: str
) -> None:
    with maskwire.attach(server.address) as client, pytest.raises(InvalidRequestError, match=words):
        client.eval_loss(ragged(2), **options)


def test_a_chain_rule_over_the_limit_is_refused_with_the_limit(serve: Callable[..., ServerProcess]) -> None:
    server = serve(serve__max_read_tokens="2048")
    with maskwire.attach(server.address) as client:
        # 2 rows of 16 columns take 16 passes each, and a pass counts at least 64 columns: 2 * 16 * 64.
        rows = np.arange(32).reshape(2, 16) % 16
        assert client.eval_loss(rows, estimator="chain_rule").tokens == 32
        words = r"at most 2048 positions through the model \(serve.max_read_tokens\), got 4096"
        with pytest.raises(InvalidRequestError, match=words) as raised:
            client.eval_loss(rows, estimator="chain_rule", chain_order="random", draws=2)
        assert raised.value.field == "batch.shape"


def test_the_client_names_what_it_cannot_send() -> None:
    with maskwire.attach("127.0.0.1:1", retry_for=0) as client:
        for wrong, words in (
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"rows": 3}, "the argument rows needs a maskwire.data.TokenData"),
            ({"row_ids": [1]}, r"row_ids must have one value per row \(2 rows\)"),
            ({"estimator": "best"}, "estimator must be one of systematic, chain_rule, got 'best'"),
        ):
            with pytest.raises(ValueError, match=words):
                client.evaluate([[1, 2], [3]], **wrong)
        with pytest.raises(ValueError, match="nothing to evaluate"):
            client.evaluate([])


def test_the_command_evaluates_a_whole_folder(server: ServerProcess, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(rng.integers(0, 16, 50 + number).astype(np.uint8).tobytes())
    command = [sys.executable, "-m", "maskwire", "eval", str(tmp_path), "--target", server.address]

    def run(*options: str, code: int = 0) -> str:
        done = fork_server.run([*command, *options], text=True)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    whole = json.loads(run("--draws", "2", "--json"))
    assert (whole["tokens"], len(whole["rows"])) == (153, 6)
    parts = json.loads(run("--draws", "2", "--batch-size", "1", "--json"))
    assert parts["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-5)
    table = run("--draws", "2")
    assert "negative ELBO" in table
    assert "6 rows, 153 tokens x 2 draws" in table
    assert "chain rule, random" in run("--chain-rule", "--order", "random", "--draws", "2", "--rows", "2")
    chained = json.loads(run("--chain-rule", "--raw-weights", "--json"))
    assert (chained["draws"], chained["ema_weights"]) == (1, False)
    assert "needs --chain-rule" in run("--order", "random", code=2)
    assert "--batch-size must be at least 1" in run("--batch-size", "0", code=2)
