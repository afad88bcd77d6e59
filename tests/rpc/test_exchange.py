"""A model of x-transformers is imported as a run, served, trained and exported again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from serving import ServerProcess

import maskwire
import maskwire_server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xt = pytest.importorskip("x_transformers")

SERVER = str(Path(sys.executable).with_name("maskwire-server"))
MASK_ID = 16  # of the servers that `serve` starts: ids 0 to 16


def model() -> Any:
    torch.manual_seed(0)
    layers = xt.Encoder(dim=32, depth=1, heads=2, attn_dim_head=16)
    net = xt.TransformerWrapper(num_tokens=17, max_seq_len=32, attn_layers=layers)
    wrapper = xt.NonAutoregressiveWrapper(net, mask_id=MASK_ID, self_cond=True, self_token_critic=True)
    with torch.no_grad():
        for weight in wrapper.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return wrapper.eval()


def command(*arguments: object, code: int = 0) -> str:
    done = fork_server.run([SERVER, *map(str, arguments)], text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_an_imported_model_is_served_trained_and_exported_again(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    theirs = model()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    (tmp_path / "mine.toml").write_text(
        "[model]\nmask_id = 16\nnum_tokens = 17\ndim_head = 16\n[optimizer]\nlearning_rate = 0.003\n"
        "ema_decay = 0.9\n[serve]\nthreads = 1\n"
    )
    run_dir = tmp_path / "a" / "run"
    output = command(
        "import-x-transformers",
        tmp_path / "model.pt",
        "--config",
        tmp_path / "mine.toml",
        "--run-dir",
        run_dir,
    )
    assert "self-conditioning, a self critic" in output
    assert f"serve --config {run_dir}/maskwire.toml --run-dir {run_dir}" in output
    assert "nothing is damaged" in command("verify", "--run-dir", run_dir)
    loaded = maskwire_server.load(run_dir / "checkpoints" / "imported")
    ids = torch.randint(0, 16, (3, 20))
    masked = torch.where(torch.rand(ids.shape) < 0.5, MASK_ID, ids)
    with torch.no_grad():
        first = theirs.net(masked, return_embeddings=True)
        expected = theirs.net(masked, sum_embeds=theirs.to_self_cond(first))[..., :MASK_ID]
        assert (loaded(masked)[..., :MASK_ID] - expected).abs().max() < 1e-5

    server = ServerProcess(tmp_path / "a")
    server._command = [
        SERVER, "serve", "--config", str(run_dir / "maskwire.toml"), "--run-dir", str(run_dir),
        "--address", "127.0.0.1:0",
    ]  # fmt: skip
    server.start()
    try:
        with maskwire.connect(server.address) as trainer:
            assert (trainer.step, trainer.model.max_seq_len, trainer.model.has_critic) == (0, 32, True)
            [info] = trainer.checkpoints()
            assert (info.name, info.step, info.labels["source"]) == ("imported", 0, "model.pt")
            rows = np.random.default_rng(0).integers(0, 16, (16, 10)).repeat(2, axis=1)
            before = trainer.eval_loss(rows)
            for _ in range(20):
                result = trainer.train_step(rows)
            assert trainer.eval_loss(rows).nats_per_token < before.nats_per_token
        server.kill()
        server.start()  # replays from the imported weights
        with maskwire.connect(server.address) as trainer:
            assert (trainer.step, trainer.digest) == (20, result.digest)
            trainer.checkpoint("twenty")
            trained = trainer.eval_loss(rows, raw_weights=True, estimator="chain_rule")
    finally:
        assert server.stop() == 0

    output = command(
        "export", tmp_path / "back.safetensors", "--run-dir", run_dir, "--checkpoint", "twenty",
        "--to", "x-transformers", "--weights", "raw",
    )  # fmt: skip
    assert "net = TransformerWrapper(num_tokens=17, max_seq_len=32, attn_layers=Encoder(dim=32" in output
    back = model()
    state = load_file(tmp_path / "back.safetensors")
    keys = back.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("token_critic.net.") for name in keys.missing_keys)
    back.token_critic.net = back.net
    with torch.no_grad():
        row = torch.from_numpy(rows[:1])
        total = 0.0
        for place in range(row.shape[1]):
            seen = row.clone()
            seen[:, place:] = MASK_ID
            first = back.net(seen, return_embeddings=True)
            logits = back.net(seen, sum_embeds=back.to_self_cond(first))[0, place, :MASK_ID]
            total -= float(logits.log_softmax(-1)[row[0, place]])
    assert trained.rows[0].nats == pytest.approx(total, rel=1e-4)
    command("export", tmp_path / "folder", "--run-dir", run_dir)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "ema.safetensors", "manifest.json", "model.safetensors",
    ]  # fmt: skip
    assert maskwire_server.load(tmp_path / "folder", weights="raw").mask_id == MASK_ID
    assert "exists" in command("export", tmp_path / "folder", "--run-dir", run_dir, code=2)
    assert "no checkpoint is named" in command(
        "export", tmp_path / "x", "--run-dir", run_dir, "--checkpoint", "no", code=3
    )


def test_a_failed_import_leaves_no_run_directory(tmp_path: Path) -> None:
    state = model().state_dict()
    torch.save(state, tmp_path / "model.pt")
    torch.save({**state, "net.post_emb_norm.gamma": torch.zeros(32)}, tmp_path / "norm.pt")
    run_dir = tmp_path / "run"
    options = ("--run-dir", run_dir, "--set", "model.mask_id=16", "--set", "model.num_tokens=17")
    assert "post_emb_norm is not supported" in command(
        "import-x-transformers", tmp_path / "norm.pt", *options, code=2
    )
    assert "not a multiple of model.dim_head = 64" in command(
        "import-x-transformers", tmp_path / "model.pt", *options, code=2
    )
    assert "model.mask_id must be set" in command(
        "import-x-transformers",
        tmp_path / "model.pt",
        "--run-dir",
        run_dir,
        "--set",
        "model.dim_head=16",
        code=2,
    )
    assert not run_dir.exists()
    run_dir.mkdir()
    (run_dir / "something").touch()
    assert "is not empty" in command(
        "import-x-transformers", tmp_path / "model.pt", *options, "--set", "model.dim_head=16", code=3
    )
    assert not list(tmp_path.glob("*.importing"))


def test_a_model_that_the_encoder_does_not_cover_is_imported_as_it_is(
    x_transformers_preloaded: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options = {"dim": 32, "depth": 1, "heads": 2, "attn_dim_head": 16, "dynamic_pos_bias": True}
    net = xt.TransformerWrapper(
        num_tokens=17, max_seq_len=32, num_memory_tokens=2, attn_layers=xt.Encoder(**options)
    ).eval()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    run_dir = tmp_path / "a" / "run"
    keywords = options | {"num_memory_tokens": 2}
    sets = ["model.source=x-transformers", "model.mask_id=16", "serve.threads=1"]
    sets += [f"model.x_transformers.{key}={str(value).lower()}" for key, value in keywords.items()]
    flags = [word for setting in sets for word in ("--set", setting)]
    words = command("import-x-transformers", tmp_path / "model.pt", *flags, "--run-dir", run_dir,
                    "--gains", "plain", code=2)  # fmt: skip
    assert "set model.x_transformers.norm_add_unit_offset" in words
    command("import-x-transformers", tmp_path / "model.pt", *flags, "--run-dir", run_dir)
    command("export", tmp_path / "back.safetensors", "--run-dir", run_dir, "--to", "x-transformers")
    state = load_file(tmp_path / "back.safetensors")
    assert state.keys() == {f"net.{name}" for name in net.state_dict()}
    assert all(torch.equal(state[f"net.{name}"], tensor) for name, tensor in net.state_dict().items())

    server = ServerProcess(tmp_path / "a")
    server._command = [
        SERVER, "serve", "--config", str(run_dir / "maskwire.toml"), "--run-dir", str(run_dir),
        "--address", "127.0.0.1:0",
    ]  # fmt: skip
    server.start()
    try:
        rows = np.random.default_rng(0).integers(0, 16, (4, 32))
        with maskwire.connect(server.address) as trainer:
            for _ in range(3):
                result = trainer.train_step(rows)
        server.kill()
        server.start()  # replays from the imported weights
        with maskwire.connect(server.address) as trainer:
            assert (trainer.step, trainer.digest) == (3, result.digest)
    finally:
        assert server.stop() == 0
    assert "nothing is damaged" in command("verify", "--run-dir", run_dir)
