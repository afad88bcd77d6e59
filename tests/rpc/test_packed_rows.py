"""Rows packed with several documents, through a real server that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import ServerProcess
from typer.testing import CliRunner

import maskwire
from maskwire.cli import app
from maskwire.errors import DigestVersionError, InvalidRequestError
from maskwire_server.cli import app as server_app
from maskwire_server.config import load

DOCUMENTS = [np.arange(size) + size for size in (3, 5, 2, 6)]
PACKED = [np.concatenate(DOCUMENTS[:2]), np.concatenate(DOCUMENTS[2:])]
SEGMENTS = [[0] * 3 + [1] * 5, [0] * 2 + [1] * 6]


def test_packed_rows_are_their_documents_also_after_a_kill(
    serve: Callable[..., ServerProcess],
) -> None:
    server = serve(checkpoints__every_steps="off", checkpoints__every_seconds="off")
    with maskwire.connect(server.address, on_wait=lambda _: None) as trainer:
        first = trainer.train_step(np.stack(PACKED), segment_ids=SEGMENTS)
    server.kill()
    server.start()
    with maskwire.connect(server.address, takeover=True, on_wait=lambda _: None) as trainer:
        assert trainer.step == 1
        second = trainer.train_step(np.stack(PACKED), segment_ids=np.array(SEGMENTS))
        packed = trainer.eval_loss(PACKED, segment_ids=SEGMENTS, row_ids=[7, 8, 9, 10])
        with pytest.raises(
            InvalidRequestError, match=r"row_ids must have one id per segment \(4\) or none, got 2"
        ):
            trainer.eval_loss(PACKED, segment_ids=SEGMENTS, row_ids=[7, 8])
        with pytest.raises(ValueError, match=r"segment_ids must have one number per token, shape \[2, 8\]"):
            trainer.train_step(np.stack(PACKED), segment_ids=SEGMENTS[:1])
        with pytest.raises(TypeError, match="segment_ids"):
            trainer.generate(PACKED, segment_ids=SEGMENTS)
        with pytest.raises(ValueError, match="pass each document as a row"):
            trainer.evaluate(PACKED, segment_ids=SEGMENTS)
        unpacked = trainer.eval_loss(DOCUMENTS, row_ids=[7, 8, 9, 10])
    assert packed.nats_per_token == unpacked.nats_per_token
    assert packed.rows == unpacked.rows
    other = serve("b")
    with maskwire.connect(other.address) as trainer:
        assert [trainer.train_step(DOCUMENTS).loss for _ in range(2)] == [first.loss, second.loss]


def test_a_run_whose_digest_does_not_cover_segments_refuses_them(
    serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(seconds=0)
    monkeypatch.setattr("maskwire.protocol.session.VERSIONS", (1,))
    with maskwire.connect(server.address) as trainer:
        trainer.train_step([[1, 2]])
        with pytest.raises(DigestVersionError, match="or start a new run"):
            trainer.train_step([[1, 2]], segment_ids=[[0, 1]])
        assert trainer.train_step([[1, 2]]).step == 2


SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(1, 200, 9) for b in (1, 20, 300)]
TEXTS = ["cat sat " * (number % 7 + 1) + str(number) for number in range(40)]


def command(app: Any, *words: object) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_a_prepared_folder_of_packed_rows_trains_as_its_documents_as_rows(
    serve: Callable[..., ServerProcess], tmp_path: Path, kind: str
) -> None:
    path, fields = tmp_path / "data.jsonl", []
    rows: list[dict[str, str]] = [{"text": text} for text in TEXTS]
    if kind == "pairs":
        fields = ["--prompt-field", "question", "--response-field", "answer"]
        rows = [{"question": q, "answer": a} for q, a in SUMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(app, "data", "prepare", path, "--out", tmp_path / "packed", "--pack", 48, *fields)
    command(server_app, "init", tmp_path / "c.toml", "--data", tmp_path / "packed")
    model = load(tmp_path / "c.toml").model
    assert model.max_seq_len == 48
    names = ("num_tokens", "mask_id", "max_seq_len")
    settings = {f"model__{name}": str(getattr(model, name)) for name in names}
    server = serve(**settings)
    target = ["--target", server.address]
    words = ["train", tmp_path / "packed", "--batch-size", 4, "--eval-every", 1, "--held-out", 0.2, "--json"]
    trained = json.loads(
        command(app, *words, "--epochs", 1, "--metrics", tmp_path / "metrics.jsonl", *target)
    )
    data = maskwire.open_data(tmp_path / "packed", batch_size=4, sampling="epochs")
    held_in, _ = data.split(0.2)
    assert trained["step"] == held_in.steps_of(1)
    wrong = CliRunner().invoke(app, [*map(str, words), "--length", "16", "--until-step", "9", *target])
    assert wrong.exit_code == 2
    assert "length (--length) must be 48, or left out" in wrong.stderr
    other = serve("b", **settings)
    losses, shared = [], 0
    with maskwire.connect(other.address) as trainer:
        for step in range(1, trained["step"] + 1):
            batch = held_in.batch(step)
            documents, masks = [], []
            for number, ids in enumerate(batch.tokens):
                cuts = np.flatnonzero(np.diff(batch.segment_ids[number])) + 1
                documents += np.split(ids, cuts)
                if kind == "pairs":
                    masks += np.split(batch.prompt_mask[number], cuts)
            shared += len(documents) > len(batch.tokens)
            losses.append(trainer.train_step(documents, prompt_mask=masks or None).loss)
        ours = trainer.evaluate(data, draws=2)
    assert shared, "rows have several documents"
    assert losses[-1] == trained["loss"]
    told = json.loads(command(app, "eval", tmp_path / "packed", "--draws", 2, *target, "--json"))
    assert told["nats_per_token"] == ours.nats_per_token
    assert (told["bits_per_byte"] is None) == (kind == "pairs")
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["loss"] for line in lines if "loss" in line] == losses
