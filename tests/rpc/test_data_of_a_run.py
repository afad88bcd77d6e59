"""Data prepared on one side, trained by a real server, and prompts that the run's own tokenizer encodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import ServerProcess
from typer.testing import CliRunner

import maskwire
from maskwire.cli import app
from maskwire.errors import InvalidRequestError, TokenizerError
from maskwire.results import TokenizerDescription
from maskwire_server.cli import app as server_app
from maskwire_server.config import load

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(8) for b in range(8)]


def command(app: Any, *words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of characters, with a start, and neither a mask nor an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["<s>", *"0123456789+="])}
    made = Tokenizer(models.WordLevel(vocabulary))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "t.json"))
    return tmp_path / "t.json"


def test_samples_in_tensorboard_are_text_of_the_data_s_tokenizer(
    serve: Callable[..., ServerProcess], tmp_path: Path, tokenizer: Path
) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    (tmp_path / "sums.txt").write_text("".join(q + a for q, a in SUMS))
    command(
        app, "data", "prepare", tmp_path / "sums.txt", "--out", tmp_path / "sums", "--tokenizer", tokenizer
    )
    meta = json.loads((tmp_path / "sums" / "maskwire-data.json").read_text())
    server = serve(
        telemetry__tensorboard="true",
        **{f"model__{name}": str(meta[name]) for name in ("num_tokens", "mask_id")},
    )
    command(app, "train", tmp_path / "sums", "--until-step", 1, "--length", 8, "--target", server.address)
    words = ["generate", "--prompt", "3+4=", "--length", 8, "--temperature", 0, "--target", server.address]
    command(app, *words)
    assert server.stop() == 0
    folder = server.folder / "run" / "tensorboard"
    found = accumulators.EventAccumulator(str(folder), {"tensors": 0}).Reload()
    (event,) = found.Tensors("samples")
    (text,) = event.tensor_proto.string_val
    assert text.decode().startswith("    3+4=")


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_prompt_is_answered_by_a_run_that_was_trained_on_pairs(
    serve: Callable[..., ServerProcess], tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in SUMS))
    made = ["--tokenizer", request.getfixturevalue("tokenizer")] if kind == "file" else []
    fields = ["--prompt-field", "question", "--response-field", "answer"]
    command(app, "data", "prepare", path, "--out", tmp_path / "sums", *fields, *made)
    said = command(server_app, "init", tmp_path / "c.toml", "--data", tmp_path / "sums")
    model = load(tmp_path / "c.toml").model
    expected = (258, 256, 7) if kind == "bytes" else (15, 13, 8)
    assert (model.num_tokens, model.mask_id, model.max_seq_len) == expected
    assert f"model.num_tokens = {expected[0]}" in said
    names = ("num_tokens", "mask_id", "max_seq_len")
    server = serve(**{f"model__{name}": str(getattr(model, name)) for name in names})
    target = ["--target", server.address]
    trained = json.loads(
        command(app, "train", tmp_path / "sums", "--epochs", 2, "--batch-size", 48, *target, "--json")
    )
    assert (trained["step"], trained["steps"]) == (3, 3), "2 epochs of 64 rows"
    data = maskwire.open_data(tmp_path / "sums", length=expected[2], batch_size=48, sampling="epochs")
    results = []
    with maskwire.connect(server.address) as trainer:
        trainer.fit(data, until_step=4, progress=False, on_step=results.append)
    given = int(data.batch(4).prompt_mask.sum())
    assert [result.metrics.maskable_tokens for result in results] == [48 * expected[2] - given]
    server.kill()
    server.start()  # the run directory keeps the tokenizer
    target = ["--target", server.address]
    words = ["generate", "--prompt", "3+4=", "--temperature", 0, *target, "--json"]
    answer = json.loads(command(app, *words))
    assert answer["text"][0].startswith("3+4=")
    assert len(answer["tokens"][0]) == expected[2], "the prompt is continued up to the longest row"
    evaluated = json.loads(command(app, "eval", tmp_path / "sums", "--draws", 1, *target, "--json"))
    assert evaluated["tokens"] == sum(expected[2] - len(q) - (kind == "file") for q, _ in SUMS)
    with maskwire.attach(server.address) as client:
        kept = client.tokenizer_of_run()
    assert kept is not None
    if kind == "file":
        content = request.getfixturevalue("tokenizer").read_bytes()
        assert (kept.file, kept.document_start, kept.document_end) == (content, (0,), (14,))
        command(app, "data", "tokenizer", "--out", tmp_path / "t", *target)
        assert (tmp_path / "t" / "tokenizer.json").read_bytes() == content
    else:
        assert kept == TokenizerDescription("bytes", document_end=(257,))


def test_the_run_keeps_only_the_tokenizer_of_its_data(
    serve: Callable[..., ServerProcess], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(seconds=0)
    file = b"a tokenizer's file"
    ours = TokenizerDescription(f"sha256:{hashlib.sha256(file).hexdigest()}", file, (1,), (2,))
    with maskwire.connect(server.address) as trainer:
        assert trainer.tokenizer_of_run() is None
        with pytest.raises(TokenizerError, match=r"the run uses tokenizer \(none yet\), got sha256:"):
            trainer.keep_tokenizer(ours)
        trainer.use_tokenizer(ours.name)
        with pytest.raises(
            InvalidRequestError, match=r"tokenizer\.file must have the hash in tokenizer\.name"
        ):
            trainer.keep_tokenizer(TokenizerDescription(ours.name, b"another file"))
        with pytest.raises(InvalidRequestError, match=r"document_end must have at most 64 ids, got 65"):
            trainer.keep_tokenizer(TokenizerDescription(ours.name, file, (), tuple(range(65))))
        trainer.keep_tokenizer(ours)
        assert trainer.tokenizer_of_run() == ours
        kept = server.folder / "run" / "data-tokenizer.json"
        before = kept.stat().st_mtime_ns
        trainer.keep_tokenizer(ours)
        assert kept.stat().st_mtime_ns == before, "nothing is sent again"
    with maskwire.connect(server.address) as trainer:
        trainer.keep_tokenizer(ours)
        assert kept.stat().st_mtime_ns == before, "nor by another client"
    kept.write_text("damaged")
    with maskwire.attach(server.address) as client:
        assert client.tokenizer_of_run() is None


def test_a_tokenizer_that_cannot_be_kept_costs_no_step(
    serve: Callable[..., ServerProcess], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(seconds=0)
    (server.folder / "run" / "data-tokenizer.part").mkdir()  # in the way of the file
    data = maskwire.TokenData([[1, 2, 3]], length=3, batch_size=2, tokenizer="bytes")
    data.tokenizer_description = TokenizerDescription("bytes", document_end=(3,))
    with maskwire.connect(server.address) as trainer:
        result = trainer.fit(data, until_step=2, progress=False)
    assert result.step == 2
    assert "the server did not store the data's tokenizer (" in caplog.text
