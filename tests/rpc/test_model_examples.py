"""The examples of docs/models.md: each is served as it is written, trained, killed, and exported."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import fork_server
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from serving import ServerProcess
from typer.testing import CliRunner

import maskwire
import maskwire_server
from maskwire.cli import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NEEDS = {
    "x-transformers": ["x_transformers"],
    "Hugging Face": ["transformers"],
    "LoRA": ["transformers", "peft"],
    "Your own code": [],
}


def block(section: str, kind: str) -> str:
    """The first fenced block of a kind."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return next(text for found, text in blocks if found == kind)


def write_bert(folder: Path) -> None:
    """A model with a tokenizer, as the transformers library saves them."""
    import transformers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(95))]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def test_the_page_has_an_example_of_each_source() -> None:
    assert NEEDS.keys() <= SECTIONS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains_recovers_and_is_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if NEEDS[name]:
        alone = NEEDS[name] == ["x_transformers"]
        request.getfixturevalue("x_transformers_preloaded" if alone else "preloaded")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    section = SECTIONS[name]
    if "transformers" in NEEDS[name]:
        write_bert(tmp_path / "models" / "bert")
    if "```py\n" in section:
        (tmp_path / "mymodels.py").write_text(block(section, "py"))
    serve, *exports = block(section, "").splitlines()
    _, command, *words = shlex.split(serve)
    (tmp_path / words[words.index("--config") + 1]).write_text(block(section, "toml"))
    binary = str(Path(sys.executable).with_name("maskwire-server"))
    server = ServerProcess(tmp_path / "log")
    server._command = [binary, command, *words, "--set=serve.address=127.0.0.1:0", "--set=serve.threads=1"]
    rows = np.random.default_rng(0).integers(5, 100, (2, 16))
    server.start()
    try:
        with maskwire.connect(server.address) as trainer:
            losses = [trainer.train_step(rows).loss for _ in range(3)]
            digest = trainer.digest
        server.kill()
        shutil.rmtree(tmp_path / "models", ignore_errors=True)  # a run that exists needs no source
        server.start()
        with maskwire.connect(server.address) as trainer:
            assert (trainer.step, trainer.digest) == (3, digest)
            info = trainer.checkpoint("three")
            trainer.download("three", tmp_path / "downloaded", weights=True)
        words = ["checkpoint", "download", "three", "--merged", "--out", "merged", "--json"]
        merged = CliRunner().invoke(app, [*words, "--target", server.address])
    finally:
        assert server.stop() == 0
    assert np.isfinite(losses).all()
    for line in exports:
        done = fork_server.run([binary, *shlex.split(line)[1:]], text=True)
        assert done.returncode == 0, done.stderr
        out = tmp_path / shlex.split(line)[2]
        assert out.exists()
        assert "transformers" not in NEEDS[name] or (out / "tokenizer.json").exists()
    if name == "LoRA":
        assert merged.exit_code == 0, merged.stderr
        assert "model.safetensors" in json.loads(merged.stdout)["files"]
        assert not (tmp_path / "merged.unmerged").exists()
        ours, theirs = (
            load_file(tmp_path / each / "model.safetensors") for each in ("merged", "bert-merged")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[each], theirs[each]) for each in ours)
    else:
        assert merged.exit_code == 2
        assert "--merged is for adapters" in merged.stderr
        assert (tmp_path / "merged.unmerged" / "manifest.json").exists()
    if name != "Your own code":
        masked = torch.full((1, 4), trainer.model.mask_id)
        folder = next((tmp_path / "runs").iterdir()) / "checkpoints" / info.name
        with torch.no_grad():
            expected = maskwire_server.load(folder)(masked)
            assert torch.equal(maskwire_server.load(tmp_path / "downloaded")(masked), expected)
