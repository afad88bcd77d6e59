"""Runs of models that maskwire did not build, through real servers: killed, without their source, damaged.

MASKWIRE_KILLS sets how often each source's server is killed, at random instants; `make test` does it once.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
from serving import OFFLINE, ServerProcess
from source_models import MASK, MODERN_ENCODER, VOCABULARY, write_folder

import maskwire
import maskwire_server
from maskwire.errors import CheckpointError
from maskwire_server.results import FROZEN_FILE

Serve = Callable[..., ServerProcess]
KILLS = int(os.environ.get("MASKWIRE_KILLS", "1"))
STEPS = 10 + 4 * KILLS
FACTORY = "my_models.mine:build"
CODE = """
from torch import nn

class Model(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.ids = nn.Embedding(tokens, dim)
        self.inner = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, tokens)

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids, attention_mask):
        e = self.ids(input_ids) * attention_mask[..., None]
        return self.output(self.inner(e + e.sum(1, keepdim=True)).relu())

def build(model, dim):
    return Model(model.num_tokens, dim)
"""
pytestmark = pytest.mark.filterwarnings(  # of the libraries themselves
    "ignore::DeprecationWarning", "ignore:.is_gradient_checkpointing.:FutureWarning"
)


def tokens(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(3, 38, (4, 12))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> dict[str, Path]:
    """Folders of a small BERT, and of one that is large beside its adapters."""
    large = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512}
    return {
        "bert": write_folder(tmp_path_factory.mktemp("bert") / "model"),
        "lora": write_folder(tmp_path_factory.mktemp("large") / "model", **large),
    }


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the factory, in a package in the current folder."""
    file = tmp_path / "my_models" / "mine.py"
    file.parent.mkdir()
    file.write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return file


@pytest.fixture
def base(tmp_path: Path, folders: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """A folder of the test's own, which it may remove."""
    name = request.node.callspec.params["source"] if hasattr(request.node, "callspec") else "bert"
    copy = tmp_path / "model"
    shutil.copytree(folders.get(name, folders["bert"]), copy)
    return copy


def settings_of(source: str, base: Path) -> dict[str, str]:
    sizes = {"model__num_tokens": str(VOCABULARY), "model__mask_id": str(MASK), "model__max_seq_len": "20"}
    if source == "x-transformers":
        options = {
            f"model__x_transformers__{key}": str(value).lower() for key, value in MODERN_ENCODER.items()
        }
        return {"model__source": source, **sizes, **options}
    if source == "python":
        table = {"model__python__factory": FACTORY, "model__python__options__dim": "16"}
        return {"model__source": source, **sizes, **table}
    adapters = {"model__lora__rank": "2", "model__lora__target_modules": '["query", "value"]'}
    return {
        "model__source": "huggingface",
        "model__huggingface__path": str(base),
        "model__mask_id": str(MASK),
        **(adapters if source == "lora" else {}),
    }


@pytest.fixture
def offline(serve: Serve) -> Serve:
    """Starts servers that may not ask the hub."""

    def start(name: str = "a", **settings: str) -> ServerProcess:
        server = serve(name, optimizer__warmup_steps="0", checkpoints__every_seconds="1e6", **settings)
        server.environment |= OFFLINE
        return server

    return start


def refused(server: ServerProcess, *dropped: str, command: str = "serve") -> tuple[int, str]:
    """Exit code and messages of a start that must fail, without the settings that begin as given."""
    words = [
        word for word in server._command[2:] if not word.removeprefix("--set=").startswith(dropped or "?")
    ]
    environment = {**fork_server.os.environ, **server.environment}
    done = fork_server.run([server._command[0], command, *words], text=True, env=environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("maskwire-server:")]
    assert "Traceback" not in done.stderr
    return done.returncode, "\n".join(said)


def state_of(server: ServerProcess, folder: Path) -> dict[str, bytes]:
    """Weights, averages and optimizer state, byte for byte."""
    with maskwire.attach(server.address) as client:
        client.download(client.checkpoint("end").name, folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("source", ["bert", "lora", "x-transformers", "python"])
def test_a_run_that_is_killed_needs_no_source_to_end_as_if_nothing_had_been(
    source: str, offline: Serve, code: Path, base: Path, tmp_path: Path
) -> None:
    settings = {
        **settings_of(source, base), "objective__critic": "self", "optimizer__ema_decay": "0.9",
        "checkpoints__every_steps": "3", "checkpoints__keep_last": "2", "model__pad_id": "39",
    }  # fmt: skip
    calm = offline("calm", **settings)
    with maskwire.connect(calm.address) as trainer:
        expected = [future.result() for future in [trainer.submit(tokens(seed)) for seed in range(STEPS)]]
        evaluated = trainer.eval_loss(tokens(99), draws=4).nats_per_token
        made = trainer.generate(count=2, length=8, steps=4, seed=1)
    wanted = state_of(calm, tmp_path / "calm-end")
    assert calm.stop() == 0

    rough = offline("rough", **settings)
    rough._command.append(f"--set=serve.address={rough.address}")
    with maskwire.connect(rough.address, window=4, on_wait=lambda _: None) as trainer:
        futures = [trainer.submit(tokens(seed)) for seed in range(10)]
        draw = random.Random(source)
        for kill in range(KILLS):
            futures[-6].result()
            time.sleep(draw.random() * 0.05)
            rough.kill()
            shutil.rmtree(base, ignore_errors=kill > 0)
            rough.start()
            futures += [trainer.submit(tokens(seed)) for seed in range(len(futures), len(futures) + 4)]
        found = [future.result() for future in futures]
        assert trainer.eval_loss(tokens(99), draws=4).nats_per_token == evaluated
        assert np.array_equal(trainer.generate(count=2, length=8, steps=4, seed=1).tokens, made.tokens)
        (initial,) = (info.name for info in trainer.checkpoints() if info.step == 0)
        with pytest.raises(CheckpointError, match="it holds the weights that the run began from"):
            trainer.delete(initial)
    assert [step.losses for step in found] == [step.losses for step in expected]
    assert found[-1].digest == expected[-1].digest
    assert state_of(rough, tmp_path / "rough-end") == wanted
    saved = rough.folder / "run" / "checkpoints"
    names = {folder.name for folder in saved.iterdir()}
    assert initial in names
    assert len(names) <= 4, "beside the first and the last, the two that retention keeps"
    assert rough.stop() == 0
    done = fork_server.run([rough._command[0], "verify", f"--run-dir={rough.folder / 'run'}"], text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    words = [f"--run-dir={rough.folder / 'run'}"]
    if source == "python":
        words += ["--set=model.source=python", f"--set=model.python.factory={FACTORY}"]
    done = fork_server.run([rough._command[0], "replay", *words, "--to=0"], text=True)
    assert done.returncode == 0, done.stderr
    assert "step 0, digest " in done.stdout

    options: dict[str, Any] = {}
    if source == "python":
        with pytest.raises(ValueError, match=f"the model was built by the function '{FACTORY}'; pass it as "):
            maskwire_server.load(saved / "end")
        scope: dict[str, Any] = {}
        exec(CODE, scope)
        options["factory"] = scope["build"]
    module = maskwire_server.load(saved / "end", **options)
    logits = module(torch.tensor([[3, 4, MASK, 6]]))
    assert logits.shape == (1, 4, 1000 if source == "lora" else VOCABULARY)
    assert torch.isfinite(logits[..., :39]).all()


@pytest.mark.parametrize("source", ["bert", "python"])
def test_without_checkpoints_the_source_is_loaded_again_and_must_be_as_it_was(
    source: str, offline: Serve, code: Path, base: Path
) -> None:
    server = offline(**settings_of(source, base))
    with maskwire.connect(server.address) as trainer:
        digest = [trainer.train_step(tokens(seed)) for seed in range(3)][-1].digest
    server.kill()
    saved = server.folder / "run" / "checkpoints"
    shutil.rmtree(saved)
    server.start()
    assert "replayed 3 steps" in server.log.read_text()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (3, digest)
    server.kill()
    shutil.rmtree(saved)
    if source == "bert":
        shutil.rmtree(base)
        code_, said = refused(server)
        assert code_ == 2
        assert f"model.huggingface.path: the weights of {base} cannot be loaded" in said
        write_folder(base, seed=2)
    else:
        code.write_text(CODE.replace("nn.Linear(dim, dim)", "nn.Linear(dim, dim, bias=False)"))
    code_, said = refused(server)
    assert code_ == 3, said
    assert "the model's source no longer gives the weights that the run began from: their SHA-256 is " in said


def test_adapters_share_one_copy_of_their_base_and_its_damage_is_found(
    offline: Serve, folders: dict[str, Path]
) -> None:
    server = offline(checkpoints__every_steps="2", **settings_of("lora", folders["lora"]))
    with maskwire.connect(server.address) as trainer:
        for seed in range(4):
            trainer.train_step(tokens(seed))
        trainer.checkpoint("end")
    assert server.stop() == 0
    saved = server.folder / "run" / "checkpoints"
    files = [folder / FROZEN_FILE for folder in sorted(saved.iterdir())]
    assert len(files) >= 3
    assert len({file.stat().st_ino for file in files}) == 1
    size = files[0].stat().st_size
    assert size > 2e6
    own = sum(file.stat().st_size for file in (saved / "end").iterdir() if file.name != FROZEN_FILE)
    assert own < 0.05 * size
    with files[0].open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte[0] ^ 1]))
    done = fork_server.run([server._command[0], "verify", f"--run-dir={server.folder / 'run'}"], text=True)
    assert done.returncode == 1
    assert done.stdout.count(f"{FROZEN_FILE}: does not match the manifest's size and SHA-256") == len(files)
    with pytest.raises(ValueError, match="does not match the manifest's SHA-256"):
        maskwire_server.load(saved / "end")


def test_a_server_runs_code_only_if_its_own_configuration_names_it(offline: Serve, code: Path) -> None:
    server = offline(**settings_of("python", code))
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(tokens(0))
    assert server.stop() == 0
    exit_code, said = refused(server, "model.")
    assert exit_code == 2
    assert f"model.python.factory: the run in {server.folder / 'run'} has '{FACTORY}', but the server" in said
    assert "runs code only if its own configuration names it: set model.source to 'python' and" in said
    server.start()


WRONG = {
    "def build(model, dim): raise OSError('x')\n": f"model.python.factory: {FACTORY} raised OSError: x",
    CODE.replace("e.sum(1, keepdim=True)", "e.sum((0, 1))"): "model: a row must not depend on the other rows",
    CODE + "\nimport random\nModel.forward = lambda self, input_ids, attention_mask: self.output("
    "self.ids(input_ids) * random.random())\n": "model: it must draw random numbers with torch alone",
}


@pytest.mark.parametrize("text", WRONG, ids=["raises", "mixes rows", "draws"])
def test_a_wrong_model_is_refused_before_anything_is_written(
    text: str, code: Path, tmp_path: Path, preloaded: None
) -> None:
    code.write_text(text)
    server = ServerProcess(tmp_path / "a", **settings_of("python", code))
    exit_code, said = refused(server)
    assert exit_code == 2
    assert said.startswith(f"maskwire-server: {WRONG[text]}")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "a" / "run").exists()
