"""Weights out: checked downloads that go on where they were, and a plain torch module that agrees."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from serving import ServerProcess

import maskwire
import maskwire_server
from maskwire.errors import CheckpointError, read_failure
from maskwire.v1 import training_service_pb2 as pb

Serve = Callable[..., ServerProcess]
Stub = Callable[[ServerProcess], Any]

VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "self-conditioning, critic, moving average": {
        "objective__self_cond": "true", "objective__critic": "self", "optimizer__ema_decay": "0.9",
    },
    "rotary, swiglu, tied": {
        "model__positions": "rotary", "model__feed_forward": "swiglu", "model__tied_embeddings": "true",
        "model__norm": "rmsnorm", "model__qk_norm": "true",
    },
    "padding, separate critic": {"model__pad_id": "0", "objective__critic": "token", "model__emb_dim": "16"},
}  # fmt: skip


def tokens(seed: int, rows: int = 4, columns: int = 12) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 16, (rows, columns))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loaded_module_has_the_servers_logits(serve: Serve, tmp_path: Path, variant: str) -> None:
    server = serve(**VARIANTS[variant])
    ema = "optimizer__ema_decay" in VARIANTS[variant]
    with maskwire.connect(server.address) as trainer:
        for seed in range(5):
            trainer.train_step(tokens(seed), learning_rate=0.05)
        trainer.checkpoint("done")
        trainer.download("done", tmp_path / "got", weights=True)
        # With one position to predict, a row's nats are -log p(its id | the rest): ask for every id at
        # that position, and the whole distribution that the server evaluates is there.
        row, place = tokens(99, rows=1)[0], 5
        rows = np.repeat(row[None], 15, axis=0)
        rows[:, place] = np.arange(1, 16)
        prompt = np.ones(rows.shape, dtype=bool)
        prompt[:, place] = False
        for raw in (False, True) if ema else (False,):
            found = trainer.eval_loss(rows, prompt_mask=prompt, draws=2, raw_weights=raw)
            served = -torch.tensor([part.nats for part in found.rows], dtype=torch.float64)
            model = maskwire_server.load(tmp_path / "got", weights="raw" if raw else "auto")
            masked = torch.from_numpy(row).clone()[None]
            masked[0, place] = model.mask_id
            with torch.no_grad():
                logits = model(masked)
            assert logits.shape == (1, 12, 17)
            assert logits[0, place, model.mask_id] == -torch.inf
            ours = logits[0, place].double().log_softmax(-1)[1:16]
            assert torch.allclose(ours, served, atol=2e-6), (ours - served).abs().max()
    assert isinstance(model, torch.nn.Module)
    assert not model.training


def test_padding_changes_nothing_for_the_loaded_module(serve: Serve, tmp_path: Path) -> None:
    server = serve(model__pad_id="0")
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(tokens(0))
        name = trainer.checkpoint().name
        trainer.download(name, tmp_path / "got", weights=True)
    model = maskwire_server.load(tmp_path / "got")
    short = torch.from_numpy(tokens(1, rows=2, columns=8))
    padded = torch.nn.functional.pad(short, (0, 4), value=0)
    with torch.no_grad():
        assert torch.allclose(model(padded)[:, :8], model(short), atol=1e-5)


def test_a_folder_that_does_not_do_is_named(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:
        trainer.checkpoint("a")
        trainer.download("a", tmp_path / "got")
    got = tmp_path / "got"
    load = maskwire_server.load
    load(got)
    load(server.folder / "run" / "checkpoints" / "a")
    with pytest.raises(ValueError, match="keeps no moving average"):
        load(got, weights="ema")
    with pytest.raises(ValueError, match="auto, ema or raw, got 'best'"):
        load(got, weights="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not a complete checkpoint: manifest\.json cannot be read"):
        load(tmp_path)
    whole = (got / "model.safetensors").read_bytes()
    for place in (8, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (got / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="does not match the manifest's SHA-256"):
            load(got)
    (got / "model.safetensors").write_bytes(whole)
    manifest = json.loads((got / "manifest.json").read_bytes())
    manifest["configuration"]["model"]["heads"] = 4
    (got / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not match its own hash"):
        load(got)


def test_loading_needs_neither_grpc_nor_a_server(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:
        trainer.checkpoint("a")
        trainer.download("a", tmp_path / "got", weights=True)
    assert server.stop() == 0
    code = (
        "import sys, torch, maskwire_server\n"
        f"model = maskwire_server.load({str(tmp_path / 'got')!r})\n"
        "print(model(torch.full((1, 4), model.mask_id)).shape)\n"
        "print({'grpc', 'sqlite3', 'maskwire.client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([1, 4, 17])\nset()"


def big(server: ServerProcess) -> str:
    """A checkpoint of several chunks."""
    with maskwire.attach(server.address) as client:
        return client.checkpoint("big").name


BIG = {"model__dim": "256", "model__depth": "3", "model__heads": "4", "model__dim_head": "32"}


def test_a_download_goes_on_where_it_was(serve: Serve, tmp_path: Path) -> None:
    server = serve(**BIG)
    big(server)
    source = server.folder / "run" / "checkpoints" / "big"
    whole = (source / "optimizer.safetensors").read_bytes()
    assert len(whole) > 3 * 2**20
    folder = tmp_path / "got"

    class Enough(Exception):
        pass

    def stop(here: int, total: int) -> None:
        if here > total // 2:
            raise Enough

    with maskwire.attach(server.address) as client:
        with pytest.raises(Enough):
            client.download("big", folder, on_progress=stop)
        assert not (folder / "manifest.json").exists(), "not whole yet"
        parts = list(folder.glob("optimizer.*.part"))
        assert len(parts) == 1
        assert 0 < parts[0].stat().st_size < len(whole)
        with parts[0].open("rb+") as file:  # as a write that was cut off
            file.truncate(parts[0].stat().st_size - 1000)
        places: list[int] = []
        client.download("big", folder, on_progress=lambda here, _: places.append(here))
        assert places[1] > 2**20, "what was there was not fetched again"
    assert (folder / "optimizer.safetensors").read_bytes() == whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors"]  # fmt: skip


def test_a_download_outlives_a_kill_of_the_server(serve: Serve, tmp_path: Path) -> None:
    server = serve(**BIG)
    big(server)
    server._command.append(f"--set=serve.address={server.address}")
    starting: list[threading.Thread] = []

    def kill(here: int, total: int) -> None:
        if here > total // 3 and not starting:
            server.kill()
            starting.append(threading.Thread(target=server.start))
            starting[0].start()

    with maskwire.attach(server.address, on_wait=lambda _: None) as client:
        folder = client.download("big", tmp_path / "got", on_progress=kill)
    starting[0].join()
    maskwire_server.load(folder)


def test_a_part_that_was_damaged_here_is_found_and_fetched_again(serve: Serve, tmp_path: Path) -> None:
    server = serve(**BIG)
    big(server)
    folder = tmp_path / "got"
    with maskwire.attach(server.address) as client:
        client.download("big", folder)
        weights = folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        client.download("big", folder)
        assert maskwire_server.load(folder) is not None
        client.checkpoint("other")
        with pytest.raises(CheckpointError, match=r"holds checkpoint 'big' with digest .* not 'other' with"):
            client.download("other", folder)
        strange = tmp_path / "strange"
        strange.mkdir()
        (strange / "manifest.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"manifest\.json is not a checkpoint's manifest"):
            client.download("big", strange)
        assert (strange / "manifest.json").read_text() == "[]"
        part = next(iter(client.checkpoints()[0].files.values())).sha256.hex()[:12]
        again = tmp_path / "again"
        again.mkdir()
        (again / f"model.safetensors.{part}.part").write_bytes(bytes(100))
        with pytest.raises(CheckpointError, match="does not match its SHA-256; it was deleted"):
            client.download("big", again)
        client.download("big", again)


def test_a_checkpoint_damaged_on_the_server_is_not_delivered(
    serve: Serve, stub: Stub, tmp_path: Path
) -> None:
    server = serve(**BIG)
    big(server)
    weights = server.folder / "run" / "checkpoints" / "big" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with maskwire.attach(server.address) as client, pytest.raises(CheckpointError, match="SHA-256"):
        client.download("big", tmp_path / "got")
    assert not (tmp_path / "got" / "model.safetensors").exists()
    weights.write_bytes(data[:-10])
    with pytest.raises(grpc.RpcError) as raised:
        list(
            stub(server).DownloadCheckpoint(
                pb.DownloadCheckpointRequest(name="big", file="model.safetensors")
            )
        )
    assert raised.value.code() is grpc.StatusCode.DATA_LOSS
    assert read_failure(raised.value).error.reason == "CHECKPOINT_DAMAGED"


def test_requests_that_make_no_sense_are_refused(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0)
    big(server)
    for fields, code, words in (
        ({"name": "none"}, grpc.StatusCode.NOT_FOUND, "no checkpoint"),
        ({"name": "../big"}, grpc.StatusCode.INVALID_ARGUMENT, "lower-case letters, digits"),
        ({"name": "big", "file": "../../journal.sqlite"}, grpc.StatusCode.NOT_FOUND, "has no file"),
        (
            {"name": "big", "file": "state.json", "offset_bytes": 10**9},
            grpc.StatusCode.INVALID_ARGUMENT,
            "at most",
        ),
        ({"name": "big", "offset_bytes": 5}, grpc.StatusCode.INVALID_ARGUMENT, "0 if file is not set"),
        (
            {"name": "big", "file": "state.json", "offset_bytes": -1},
            grpc.StatusCode.INVALID_ARGUMENT,
            "at least 0",
        ),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            list(stub(server).DownloadCheckpoint(pb.DownloadCheckpointRequest(**fields)))
        assert raised.value.code() is code, raised.value.details()
        assert words in raised.value.details()


def test_a_checkpoint_stays_while_it_is_read_and_readers_that_leave_make_room(
    serve: Serve, stub: Stub
) -> None:
    server = serve(
        **BIG, checkpoints__every_steps="1", checkpoints__keep_last="2", checkpoints__every_seconds="1e6"
    )
    service = stub(server)
    folder = server.folder / "run" / "checkpoints" / "step-000000000"
    streams = [service.DownloadCheckpoint(pb.DownloadCheckpointRequest(name=folder.name)) for _ in range(4)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as raised:
        list(service.DownloadCheckpoint(pb.DownloadCheckpointRequest(name=folder.name)))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert read_failure(raised.value).retryable
    with maskwire.connect(server.address) as trainer:
        for seed in range(4):
            trainer.train_step(tokens(seed))
            trainer.checkpoint(f"by-hand-{seed}")  # waits for the automatic one
        assert folder.exists(), "it is being read"
        rest = list(streams[0])
        assert rest[-1].file.name == "manifest.json"
        for stream in streams[1:]:
            stream.cancel()
        names = [info.name for info in trainer.checkpoints()]
        list(service.DownloadCheckpoint(pb.DownloadCheckpointRequest(name=names[0])))


def test_weights_alone_are_a_choice_of_the_wire_too(serve: Serve, stub: Stub) -> None:
    server = serve(optimizer__ema_decay="0.9")
    big(server)
    chunks = list(
        stub(server).DownloadCheckpoint(pb.DownloadCheckpointRequest(name="big", weights_only=True))
    )
    assert [chunk.file.name for chunk in chunks] == ["ema.safetensors", "model.safetensors", "manifest.json"]


def test_weights_that_are_never_trained_come_with_the_others(
    serve: Serve, stub: Stub, tmp_path: Path
) -> None:
    """The others do not load without them."""
    server = serve(optimizer__ema_decay="0.9", optimizer__groups='[{match = "*_emb.weight", train = false}]')
    big(server)
    request = pb.DownloadCheckpointRequest(name="big", weights_only=True)
    assert "frozen.safetensors" in {chunk.file.name for chunk in stub(server).DownloadCheckpoint(request)}
    with maskwire.attach(server.address) as client:
        for choice in ({"weights": True}, {"ema": True}):
            folder = client.download("big", tmp_path / next(iter(choice)), **choice)
            assert (folder / "frozen.safetensors").exists()
            maskwire_server.load(folder)


def test_without_the_moving_average_nothing_else_is_taken_for_it(serve: Serve, tmp_path: Path) -> None:
    server = serve(optimizer__ema_decay="0.9")
    big(server)
    with maskwire.attach(server.address) as client:
        folder = client.download("big", tmp_path / "got", weights=True)
        assert {path.name for path in folder.iterdir()} == {
            "manifest.json",
            "model.safetensors",
            "ema.safetensors",
        }
        alone = client.download("big", tmp_path / "alone", ema=True)
        assert {path.name for path in alone.iterdir()} == {"manifest.json", "ema.safetensors"}
    (folder / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="or use the trained weights with weights = 'raw'"):
        maskwire_server.load(folder)
    maskwire_server.load(folder, weights="raw")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        maskwire_server.load(alone, weights="raw")


def test_a_manifest_tells_nothing_of_the_server_and_reaches_nothing_beside_it(
    serve: Serve, stub: Stub
) -> None:
    server = serve(seconds=0)
    big(server)
    folder = server.folder / "run" / "checkpoints"
    manifest = json.loads((folder / "big" / "manifest.json").read_bytes())
    assert set(manifest["configuration"]) == {"model", "objective", "optimizer"}
    assert str(server.folder) not in json.dumps(manifest)
    (server.folder / "secret").write_text("of the operator")
    hostile = {
        **manifest,
        "name": "hostile",
        "files": {"../../../secret": {"size_bytes": 15, "sha256": "00" * 32}},
    }
    body = {key: value for key, value in hostile.items() if key != "manifest_sha256"}
    sha = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "hostile").mkdir()
    (folder / "hostile" / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": sha}))
    with pytest.raises(grpc.RpcError) as raised:
        list(stub(server).DownloadCheckpoint(pb.DownloadCheckpointRequest(name="hostile")))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_nobody_takes_the_names_of_the_servers_own_checkpoints(serve: Serve) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        for name in ("step-000000001", "step-7", "step-1-lineage-2"):
            with pytest.raises(maskwire.MaskwireError, match="the server names its own checkpoints"):
                trainer.checkpoint(name)
        assert trainer.checkpoint("step-one").name == "step-one"


def test_what_is_not_of_the_checkpoint_stays_and_one_download_writes_at_a_time(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(**BIG)
    big(server)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("years of work")
    with maskwire.attach(server.address) as client:
        with pytest.raises(CheckpointError, match="exists and is not this checkpoint's"):
            client.download("big", mine, weights=True)
        assert (mine / "model.safetensors").read_text() == "years of work"
        seen: list[str] = []

        def second(here: int, total: int) -> None:
            if here and not seen:
                seen.append("")
                with maskwire.attach(server.address) as other, pytest.raises(CheckpointError) as raised:
                    other.download("big", tmp_path / "got")
                seen.append(str(raised.value))

        folder = client.download("big", tmp_path / "got", on_progress=second)
    assert "another download is writing to" in seen[1]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    maskwire_server.load(folder)


def test_a_moving_average_can_be_switched_on_later(serve: Serve) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(tokens(0))
        before = trainer.eval_loss(tokens(9)).nats_per_token
    assert server.stop() == 0
    server._command.append("--set=optimizer.ema_decay=0.9")
    server.start()
    with maskwire.connect(server.address) as trainer:
        found = trainer.eval_loss(tokens(9))
        assert (found.nats_per_token, found.ema_weights) == (before, True)
        trainer.train_step(tokens(1))
        averaged, raw = (trainer.eval_loss(tokens(9), raw_weights=raw) for raw in (False, True))
        assert averaged.nats_per_token != raw.nats_per_token
