"""The two promises against real processes, real signals and a real full disk."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
from maskwire.errors import FencedError, HistoryLostError, UnavailableError

Serve = Callable[..., ServerProcess]
EVERYTHING = {
    "objective__critic": "self", "objective__self_cond": "true", "optimizer__ema_decay": "0.9",
    "serve__micro_batch_tokens": "32", "checkpoints__every_steps": "7",
}  # fmt: skip
KILLS = int(os.environ.get("MASKWIRE_KILLS", "4"))


def tokens(seed: int, rows: int = 4, columns: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 16, (rows, columns))


def at_one_port(server: ServerProcess) -> None:
    """Started again it listens where it did."""
    server._command.append(f"--set=serve.address={server.address}")


def state_of(server: ServerProcess, folder: Path) -> dict[str, bytes]:
    """Weights, averages and optimizer state, byte for byte."""
    with maskwire.attach(server.address) as client:
        client.download(client.checkpoint("end").name, folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_killed_at_any_instant_the_run_ends_as_if_nothing_had_been(serve: Serve, tmp_path: Path) -> None:
    """MASKWIRE_KILLS=50 for the whole of it. Each kill finds steps in flight: sent, and not answered."""
    rough = serve("rough", **EVERYTHING)
    at_one_port(rough)
    draw, futures, kills = random.Random(KILLS), [], 0
    with maskwire.connect(rough.address, window=4, on_wait=lambda _: None) as trainer:
        while kills < KILLS:
            futures += [trainer.submit(tokens(len(futures) + i)) for i in range(12)]
            time.sleep(draw.random() * 0.15)  # into the computation, a commit, a checkpoint
            rough.kill()
            kills += not futures[-1].done()
            rough.start()
        futures += [trainer.submit(tokens(len(futures) + i)) for i in range(8)]
        found = [future.result() for future in futures]
        assert trainer.status().durable_step == len(found)
    calm = serve("calm", **EVERYTHING)
    with maskwire.connect(calm.address) as trainer:
        expected = [future.result() for future in [trainer.submit(tokens(s)) for s in range(len(found))]]
    assert [step.losses for step in found] == [step.losses for step in expected]
    assert found[-1].digest == expected[-1].digest
    assert state_of(rough, tmp_path / "rough") == state_of(calm, tmp_path / "calm")
    assert rough.log.read_text().count("replayed") >= KILLS // 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)


@pytest.mark.parametrize("reserve", ["2000000", "0"], ids=["with a reserve", "without"])
def test_a_full_disk_holds_training_until_there_is_room(serve: Serve, small_disk: Path, reserve: str) -> None:
    server = serve(
        seconds=0.01,
        run__dir=str(small_disk / "run"),
        serve__reserve_bytes=reserve,
        checkpoints__every_seconds="1e6",
    )
    filler = small_disk / "filler"
    with maskwire.connect(server.address, on_wait=lambda _: None, retry_for=60) as trainer:
        trainer.train_step(tokens(0) + 20)
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        futures = [trainer.submit(np.full((64, 256), 20 + i)) for i in range(4)]
        deadline = time.monotonic() + 30
        while trainer.status().state.name != "HELD" and time.monotonic() < deadline:
            if all(future.done() for future in futures):
                futures.append(trainer.submit(np.full((64, 256), 99)))
            time.sleep(0.05)
        status = trainer.status()
        assert (status.state.name, status.waiting_for) == ("HELD", "space on the journal's disk")
        before = status.durable_step
        other = maskwire.attach(server.address, retry_for=0.2, on_wait=lambda _: None)
        with other, pytest.raises(UnavailableError):
            other.checkpoint("now")
        filler.unlink()
        results = [future.result(timeout=50) for future in futures]
        assert results[-1].step == trainer.step > before
        assert trainer.status().state.name == "SERVING"
    server.kill()
    server.start()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (results[-1].step, results[-1].digest)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "older"])
def test_a_client_that_remembers_finds_a_lost_tail(serve: Serve, tmp_path: Path, damage: str) -> None:
    server = serve(seconds=0, checkpoints__every_seconds="1e6")
    at_one_port(server)
    run = server.folder / "run"
    with maskwire.connect(server.address, on_wait=lambda _: None, retry_for=20) as trainer:
        for seed in range(4):
            trainer.train_step(tokens(seed) + 20)
        if damage == "older":
            server.kill()
            shutil.copytree(run, tmp_path / "copy")
            server.start()
        for seed in range(4, 8):
            trainer.train_step(tokens(seed) + 20)
        server.kill()
        log = run / "journal.sqlite-wal"
        if damage == "cut":
            os.truncate(log, log.stat().st_size * 2 // 3)
        elif damage == "flip":
            data = bytearray(log.read_bytes())
            data[len(data) // 2] ^= 1
            log.write_bytes(data)
        elif damage == "gone":
            log.unlink()
        else:
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "copy", run)
        started = fork_server.Process(
            server._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert started.stdout is not None
        line = started.stdout.readline()
        if line:
            with pytest.raises(HistoryLostError, match=r"acknowledged steps are missing|not the same"):
                trainer.train_step(tokens(9) + 20)
            started.kill()
        else:  # it refuses to begin at all, and says why
            assert started.wait(20) == 3
            assert "journal" in (started.stderr.read() if started.stderr else "")
        started.communicate()


def test_two_clients_of_one_name_that_reconnect_in_turn(serve: Serve) -> None:
    server = serve(seconds=0)
    at_one_port(server)
    with maskwire.connect(server.address, name="job", on_wait=lambda _: None) as first:
        first.train_step(tokens(0) + 20)
        with maskwire.connect(server.address, name="job", on_wait=lambda _: None) as second:
            second.train_step(tokens(1) + 20)
            for _ in range(3):
                server.kill()
                server.start()
                with pytest.raises(FencedError):
                    first.train_step(tokens(2) + 20)
                second.train_step(tokens(3) + 20)
            assert second.step == second.status().step == 5


@pytest.mark.parametrize("place", ["step.computed", "step.consumed", "journal.written"])
def test_a_takeover_between_the_update_and_the_commit_loses_and_doubles_nothing(
    serve: Serve, tmp_path: Path, place: str
) -> None:
    held = tmp_path / "held"
    held.touch()
    number = 6 if place == "journal.written" else 2  # create, save, start, session, step 1, step 2
    server = serve(seconds=0, fail=f"{place}:hold:{number}:{held}")
    with maskwire.connect(server.address, name="first") as first:
        first.train_step(tokens(1) + 20)
        futures = [first.submit(tokens(i) + 20) for i in (2, 3, 4)]
        time.sleep(0.3)
        assert not futures[0].done(), "updated, not committed"
        with ThreadPoolExecutor(1) as threads:
            opening = threads.submit(maskwire.connect, server.address, name="thief", takeover=True)
            time.sleep(0.3)
            assert not opening.done(), "it waits for the running commit"
            held.unlink()
            with opening.result(20) as thief:
                done = [future for future in futures if future.exception(20) is None]
                assert done, "the step that was updated is acknowledged"
                assert thief.step == 1 + len(done)
                assert all(isinstance(f.exception(), FencedError) for f in futures[len(done) :])
                thief.train_step(tokens(9) + 20)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "run" / "journal.sqlite")) as journal:
        rows = journal.execute("SELECT step, payload_hash FROM steps ORDER BY step").fetchall()
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row[1] for row in rows}) == len(rows), "no batch twice"


FOLLOWED = {
    "optimizer.learning_rate": "0.5", "optimizer.warmup_steps": "3", "optimizer.weight_decay": "0.3",
    "optimizer.betas": "[0.8, 0.9]", "optimizer.eps": "1e-6", "optimizer.clip_grad_norm": "0.1",
    "optimizer.groups": '[{match = "blocks.0.*", lr_scale = 0.5, weight_decay = 0.1}]',
    "optimizer.momentum": "0.9",
    "optimizer.schedule": "cosine", "optimizer.total_steps": "50", "optimizer.min_learning_rate": "1e-5",
}  # fmt: skip
NO_MATTER = {
    "checkpoints.every_steps": "3", "checkpoints.every_seconds": "9", "checkpoints.keep_last": "5",
    "checkpoints.keep_every": "4", "checkpoints.keep_best": "2", "serve.keep_payloads": "all",
    "serve.queue_limit": "9", "serve.window": "2",
    "serve.max_batch_tokens": "65536", "serve.max_message_bytes": "1048576", "serve.max_draws": "32",
    "serve.max_generation_steps": "64", "serve.max_read_tokens": "4096",
    "serve.activation_checkpointing": "true", "serve.deterministic": "true",
    "serve.session_idle_seconds": "5", "serve.gap_seconds": "1", "serve.drain_seconds": "9",
    "serve.reserve_bytes": "1000", "serve.poison_after": "3", "serve.reflection": "false",
    "serve.max_read_seconds": "9", "serve.max_reads_per_credential": "2", "serve.step_timeout_seconds": "700",
    "distributed.replicate": "1", "distributed.shard": "1", "distributed.rank_timeout_seconds": "3",
    "distributed.checkpoints_by": "leader",
    "telemetry.metrics_address": "127.0.0.1:0", "telemetry.tensorboard": "true",
    "telemetry.log_format": "json",
    "storage.acknowledge": "local", "storage.segment_seconds": "3", "storage.segment_bytes": "100000",
}  # fmt: skip
REFUSED = {
    "optimizer.ema_decay": ("0.5", "ema_decay"),
    "optimizer.name": (
        "muon",
        "optimizer.name was 'adamw' and is now 'muon'",
    ),
    "serve.threads": ("2", "fingerprint.threads was '1'"),
    "serve.micro_batch_tokens": ("16", "fingerprint.micro_batch_tokens was"),
    "serve.precision": ("bf16", "fingerprint.precision was 'fp32'"),
    "serve.compile": ("default", "fingerprint.compile was 'off'"),
    "model.dim": ("64", "model.dim is 32 in the run"),
    "objective.schedule": ("cosine", "objective.schedule is 'linear' in the run"),
    "run.seed": ("1", "run.seed is 0 in the run"),
}
CHANGES: list[tuple[dict[str, str], str]] = [
    (FOLLOWED, ""),
    (NO_MATTER, ""),
    *(({key: value}, words) for key, (value, words) in REFUSED.items()),
]


def test_each_setting_changed_with_steps_to_compute_again_goes_on_or_is_refused_by_name(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(checkpoints__every_seconds="1e6")
    with maskwire.connect(server.address) as trainer:
        for seed in range(20):
            last = trainer.train_step(tokens(seed), learning_rate=0.01)
    server.kill()
    for number, (changed, refusal) in enumerate(CHANGES):
        run = tmp_path / f"run-{number}"
        shutil.copytree(server.folder / "run", run)
        other = ServerProcess(tmp_path / f"server-{number}", **{"run.dir": str(run), **changed})
        if not refusal:
            other.start()
            assert "replayed 20 steps" in other.log.read_text(), changed
            with maskwire.connect(other.address) as trainer:
                assert (trainer.step, trainer.digest) == (20, last.digest), changed
            other.kill()
        else:
            refused = fork_server.run(other._command, text=True)
            assert refused.returncode == 3, (changed, refused.stderr)
            assert refusal in refused.stderr, (changed, refused.stderr)


def test_every_setting_is_in_one_of_the_three_lists() -> None:
    from maskwire_server.config import Config

    door = {"address", "socket", "allow_insecure", "durability", "device", "download_role"}
    for name, field in Config.model_fields.items():
        for key in type(field.default).model_fields:
            fixed = name in ("model", "objective") or (name, key) in {("run", "seed"), ("run", "dir")}
            at_the_door = name == "serve" and (key in door or key.startswith(("tls_", "token_")))
            at_the_door |= (name, key) == ("storage", "mirror")
            known = f"{name}.{key}" in {**FOLLOWED, **NO_MATTER, **REFUSED}
            assert known or fixed or at_the_door, f"{name}.{key}"


def test_a_batch_that_the_process_dies_of_is_set_aside(serve: Serve) -> None:
    server = serve(seconds=0, serve__poison_after="2")
    at_one_port(server)
    deadly = np.full((2, 8), 9)  # the counter trainer's batch that kills the process
    with maskwire.connect(server.address, on_wait=lambda _: None, retry_for=60) as trainer:
        trainer.train_step(tokens(0) + 20)
        future = trainer.submit(deadly)
        for _ in range(2):
            assert server._reap() == -9
            server.start()
        result = future.result(timeout=30)
        assert (result.step, result.outcome.name) == (2, "POISON")
        assert trainer.train_step(tokens(1) + 20).step == 3
    server.kill()
    server.start()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.status().state.name) == (3, "SERVING")
