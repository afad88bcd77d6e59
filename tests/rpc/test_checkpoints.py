"""Checkpoints as operators use them: kept, deleted, damaged, of an older format, over a real server."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
from maskwire.errors import CheckpointError, InvalidRequestError

Serve = Callable[..., ServerProcess]


def tokens(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(10, 200, (2, 8))


def names(trainer: maskwire.Trainer) -> list[str]:
    return [info.name for info in trainer.checkpoints()]


def test_a_checkpoint_is_deleted_unless_something_needs_it(serve: Serve) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        for name in ("one", "two", "three", "four"):
            trainer.train_step(tokens(len(name)))
            trainer.checkpoint(name)
        for name in ("three", "four"):
            with pytest.raises(CheckpointError, match="a start may need it") as raised:
                trainer.delete(name)
            assert raised.value.reason == "CHECKPOINT_NEEDED"
        trainer.restore("two")
        with pytest.raises(CheckpointError, match="lineage 2 started from it"):
            trainer.delete("two")
        trainer.train_step(tokens(9))
        trainer.checkpoint("five")
        for name in ("three", "four"):  # another branch now
            trainer.delete(name)
        with pytest.raises(CheckpointError, match="no checkpoint is named 'four'"):
            trainer.delete("four")
        own = ["step-000000002-lineage-2"]  # saved by the restore, which may be behind it by now
        assert [name for name in names(trainer) if name not in own] == [
            "five",
            "two",
            "one",
            "step-000000000",
        ]
        step, digest = trainer.step, trainer.digest
    server.kill()
    server.start()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (step, digest)


def test_a_checkpoint_that_is_downloaded_is_not_deleted(serve: Serve, tmp_path: Path) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        for name in ("one", "two", "three"):
            trainer.train_step(tokens(len(name)))
            trainer.checkpoint(name)
        trainer.download("one", tmp_path / "one")
        with pytest.raises(CheckpointError, match="was downloaded in the last minute"):
            trainer.delete("one")


def test_the_best_evaluation_is_kept(serve: Serve) -> None:
    server = serve(seconds=0, checkpoints__keep_best="1", checkpoints__keep_last="2")
    scores = iter([3.0, 2.0, 2.5, 2.8])

    class Found:
        standard_error, bits_per_token = None, 1.0

        def __init__(self, step: int) -> None:
            self.step, self.nats_per_token = step, next(scores)

    class Data:
        def batch(self, step: int) -> Any:
            return tokens(step)

    with maskwire.connect(server.address) as trainer:
        options: dict[str, Any] = {"evaluate": lambda t: Found(t.step), "eval_every": 2, "save_best": True}
        trainer.fit(Data(), until_step=6, progress=False, **options)
        found = {info.name: info.score for info in trainer.checkpoints()}
        assert found == {"best-000000004": 2.0, "best-000000002": 3.0, "step-000000000": None}
        for _ in range(3):
            trainer.checkpoint()
            trainer.train_step(tokens(trainer.step))
        trainer.checkpoint()
        assert "best-000000002" not in names(trainer), "the worse one goes"
        assert "best-000000004" in names(trainer), "the best stays however many come after it"
        again = trainer.fit(Data(), until_step=10, progress=False, **options)
        assert again.evaluations, "an evaluation that is not better than the run's best is not saved"
        assert "best-000000010" not in names(trainer)
        with pytest.raises(InvalidRequestError, match="score must be finite, got nan"):
            trainer.checkpoint(score=float("nan"))
        with pytest.raises(InvalidRequestError, match="reserved: the server names its own checkpoints"):
            trainer.checkpoint("best-1")


def rewrite(manifest: Path, **changes: Any) -> None:
    body = json.loads(manifest.read_bytes())
    body.pop("manifest_sha256")
    body.update(changes)
    body = {key: value for key, value in body.items() if value is not ...}
    text = json.dumps(body, sort_keys=True)
    body["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(body))


def test_a_checkpoint_of_the_first_format_is_read_and_one_of_a_later_is_refused_by_name(
    serve: Serve,
) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        last = trainer.train_step(tokens(0))
        trainer.checkpoint("old")
    server.kill()
    manifest = server.folder / "run" / "checkpoints" / "old" / "manifest.json"
    rewrite(manifest, format=1, score=...)
    server.start()
    assert "loaded checkpoint old" in server.log.read_text()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (1, last.digest)
        assert trainer.checkpoints()[0].score is None
    server.kill()
    rewrite(manifest, format=4)
    refused = fork_server.run(server._command, text=True)
    assert refused.returncode == 3
    assert "checkpoint 'old': its format is 4, but this version reads formats up to 3" in refused.stderr


FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors"]


def test_whichever_file_of_the_newest_checkpoint_is_damaged_the_run_starts_at_the_last_acknowledged_step(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(optimizer__ema_decay="0.9")
    rows = np.random.default_rng(0).integers(0, 16, (4, 16))
    with maskwire.connect(server.address) as trainer:
        for step in range(1, 7):
            last = trainer.train_step(rows)
            if step in (2, 4):
                trainer.checkpoint(f"at-{step}")
        expected = trainer.eval_loss(rows)
    server.kill()
    for file in FILES:
        for damage in ("flip", "truncate", "delete"):
            run = tmp_path / f"{file}-{damage}"
            shutil.copytree(server.folder / "run", run)
            path = run / "checkpoints" / "at-4" / file
            data = bytearray(path.read_bytes())
            if damage == "delete":
                path.unlink()
            else:
                # Not within a number of a manifest: its last digit need not change its value.
                at = data.index(b'"digest": "') + 11 if file == "manifest.json" else len(data) // 2
                data[at] ^= 1
                path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
            other = ServerProcess(tmp_path / f"server-{file}-{damage}", None, **{
                "run.dir": str(run), "optimizer.ema_decay": "0.9"})  # fmt: skip
            other.start()
            with maskwire.connect(other.address) as trainer:
                assert (trainer.step, trainer.digest) == (6, last.digest), (file, damage)
                if damage == "flip":
                    assert trainer.eval_loss(rows) == expected
            log = other.log.read_text()
            other.kill()
            assert "loaded checkpoint at-2" in log
            if (file, damage) != ("manifest.json", "delete"):  # that one does not exist
                assert f"checkpoint at-4 cannot be used and was moved to at-4.aside: {file}" in log
