"""Checkpoints that were copied into a live run directory never count for anything."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counter import CounterTrainer
from rig import WAIT, Rig, bare, reason, wait_for

from maskwire_server import weight_import_export
from maskwire_server.app import EXIT_RUN_DIRECTORY
from maskwire_server.checkpoints import provenance
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused
from maskwire_server.manifest import Manifest
from maskwire_server.recovery import verify
from maskwire_server.requests import DownloadRequest, RestoreRequest, SaveRequest
from maskwire_server.results import StepResult

LONG = {"every_seconds": 1e9, "keep_last": 2}


def train(engine: Engine, first: int, count: int) -> None:
    for seed in range(first, first + count):
        engine.train_step(bare(seed)).result(WAIT)


def stop(rig: Rig) -> None:
    rig.engines.pop().close()


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[list[Path]]:
    """Two checkpoints of another run, of higher steps of its lineage 1, the second with a request id."""
    other = Rig(tmp_path / "other")
    engine = other.start(checkpoints=LONG)
    folders = []
    for number in (1, 2):
        train(engine, 10 * number, 10)
        request_id = "the-same-id" if number == 2 else None
        info = engine.save(SaveRequest(None, request_id, {}, -1.0 if number == 2 else None)).result(WAIT)
        folders.append(other.folder / "checkpoints" / info.name)
    yield folders
    engine.close()


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[list[Path]]:
    """Two checkpoints of another copy of this very run, which went its own way from step 2 on."""
    twin = Rig(tmp_path / "twin")
    engine = twin.start(checkpoints=LONG)
    train(engine, 0, 2)
    engine.close()
    shutil.copytree(twin.folder, tmp_path / "run")
    engine = twin.start(checkpoints=LONG)
    folders = []
    for number in (1, 2):
        train(engine, 100 * number, 3)
        info = engine.save(SaveRequest(f"twin-{number}")).result(WAIT)
        folders.append(twin.folder / "checkpoints" / info.name)
    yield folders
    engine.close()


def copy_in(folders: list[Path], rig: Rig) -> None:
    """Copy checkpoints into a live run directory, and let a listing notice them."""
    for folder in folders:
        shutil.copytree(folder, rig.folder / "checkpoints" / folder.name)
    listed = {info.name for info in rig.engines[-1].checkpoints()}
    assert listed.isdisjoint(folder.name for folder in folders)


def test_checkpoints_of_another_run_let_no_batch_go_that_a_start_needs(
    rig: Rig, strangers: list[Path]
) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 2)
    copy_in(strangers, rig)
    train(engine, 2, 2)
    saved = engine.save(SaveRequest("own")).result(WAIT)
    train(engine, 4, 1)
    digest, state = engine.status().digest, rig.trainer.state
    stop(rig)
    flip_a_bit(rig.folder / "checkpoints" / saved.name / "state.json")
    again = rig.start(checkpoints=LONG)
    assert again.status().digest == digest
    assert rig.trainer.state == state
    assert all((rig.folder / "checkpoints" / f"{folder.name}.aside").is_dir() for folder in strangers)


def test_checkpoints_of_another_copy_of_the_run_let_no_batch_go(twins: list[Path], tmp_path: Path) -> None:
    rig = Rig(tmp_path / "run")
    engine = rig.start(checkpoints=LONG)
    train(engine, 2, 2)
    copy_in(twins, rig)
    train(engine, 4, 5)  # past the steps of the copies: the journal has them, with another digest
    saved = engine.save(SaveRequest("own")).result(WAIT)
    digest, state = engine.status().digest, rig.trainer.state
    assert {info.name for info in engine.checkpoints()}.isdisjoint({"twin-1", "twin-2"})
    assert reason(engine.restore(RestoreRequest("twin-1"))) == "CHECKPOINT_DAMAGED"
    stop(rig)
    flip_a_bit(rig.folder / "checkpoints" / saved.name / "state.json")
    again = rig.start(checkpoints=LONG)
    assert again.status().digest == digest
    assert rig.trainer.state == state
    stop(rig)


class OtherSettings(CounterTrainer):
    """As under another learning rate: the same batches, so the same digest, lead to other weights."""

    def train_step(self, *arguments: Any) -> StepResult:
        result = super().train_step(*arguments)
        self.state = hashlib.sha256(self.state.encode()).hexdigest()
        return result


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[list[Path]]:
    """Two checkpoints of a copy of the run that was trained on the run's batches under other settings."""
    twin = Rig(tmp_path / "twin")
    train(twin.start(checkpoints=LONG), 0, 2)
    stop(twin)
    shutil.copytree(twin.folder, tmp_path / "run")
    engine = twin.start(OtherSettings, accept_inexact_replay=True, checkpoints=LONG)
    folders = []
    for step in (2, 3):
        train(engine, step, 1)
        folders.append(
            twin.folder / "checkpoints" / engine.save(SaveRequest(f"trial-{step}")).result(WAIT).name
        )
    yield folders
    engine.close()


def test_checkpoints_of_a_copy_trained_on_the_same_batches_do_not_count(
    trials: list[Path], tmp_path: Path
) -> None:
    rig = Rig(tmp_path / "run")
    engine = rig.start(checkpoints=LONG)
    train(engine, 2, 1)
    copy_in(trials, rig)
    train(engine, 3, 1)
    assert {info.name for info in engine.checkpoints()}.isdisjoint({"trial-2", "trial-3"})
    assert reason(engine.restore(RestoreRequest("trial-2"))) == "CHECKPOINT_DAMAGED"
    train(engine, 4, 4)
    saved = engine.save(SaveRequest("own")).result(WAIT)
    digest, state = engine.status().digest, rig.trainer.state
    stop(rig)
    flip_a_bit(rig.folder / "checkpoints" / saved.name / "state.json")
    assert any("another copy of the run" in problem for problem in verify.verify(rig.folder).problems)
    again = rig.start(checkpoints=LONG)
    assert (again.status().digest, rig.trainer.state) == (digest, state), (
        "it started from the trial's weights"
    )
    stop(rig)


def test_checkpoints_of_version_0_1_count_without_an_id(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("kept")).result(WAIT)
    manifest = rig.folder / "checkpoints" / "kept" / "manifest.json"
    manifest.write_bytes(replace(Manifest.from_json(manifest.read_bytes()), save_id=None).to_json())
    stop(rig)
    engine = rig.start(checkpoints=LONG)
    assert "kept" in {info.name for info in engine.checkpoints()}
    assert engine.restore(RestoreRequest("kept")).result(WAIT).step == 1


def test_retention_counts_and_collects_only_the_runs_own(rig: Rig, strangers: list[Path]) -> None:
    engine = rig.start(checkpoints={"every_seconds": 1e9, "keep_last": 3, "keep_best": 1})
    copy_in(strangers, rig)
    names = []
    for step in range(1, 5):
        train(engine, step, 1)
        best = step == 2
        request = SaveRequest(None, None, {}, 5.0) if best else SaveRequest(f"s{step}")
        names.append(engine.save(request).result(WAIT).name)
    on_disk = {manifest.info.name for manifest in Checkpoints(rig.folder).all()}
    assert on_disk >= {*names, *(folder.name for folder in strangers)}, "none of them went"
    assert engine.status().newest_checkpoint is not None
    assert engine.status().newest_checkpoint.name == "s4"


def test_a_foreign_checkpoint_cannot_be_chosen_and_is_not_listed(rig: Rig, strangers: list[Path]) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("own")).result(WAIT)
    copy_in(strangers, rig)
    name = strangers[1].name
    assert [info.name for info in engine.checkpoints()] == ["own", "step-000000000"]
    assert reason(engine.restore(RestoreRequest(name))) == "CHECKPOINT_DAMAGED"
    assert reason(engine.delete(name)) == "CHECKPOINT_DAMAGED"
    with pytest.raises(Refused, match="belongs to run"):
        list(engine.download(DownloadRequest(name)))
    assert (rig.folder / "checkpoints" / name).is_dir()
    assert engine.train_step(bare(1)).result(WAIT).step == 2


def test_a_request_id_is_not_answered_with_another_runs_checkpoint(rig: Rig, strangers: list[Path]) -> None:
    engine = rig.start(checkpoints=LONG)
    copy_in(strangers, rig)
    train(engine, 0, 1)
    saved = engine.save(SaveRequest(None, "the-same-id", {}, -1.0)).result(WAIT)
    assert (saved.step, saved.digest) == (1, engine.status().digest)


def test_a_drain_saves_although_a_foreign_checkpoint_is_of_the_same_step(
    rig: Rig, strangers: list[Path]
) -> None:
    engine = rig.start(checkpoints=LONG)
    copy_in(strangers, rig)
    train(engine, 0, 5)
    engine.save(SaveRequest("five")).result(WAIT)
    train(engine, 5, 15)
    wait_for(lambda: engine.status().durable_step == 20)
    assert engine.drain(WAIT)
    own = engine.status().newest_checkpoint
    assert own is not None
    assert (own.step, own.digest) == (20, engine.status().digest)


def test_an_own_checkpoint_that_is_put_back_counts_again(rig: Rig, tmp_path: Path) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("kept")).result(WAIT)
    place = rig.folder / "checkpoints" / "kept"
    shutil.move(place, tmp_path / "kept")
    stop(rig)
    engine = rig.start(checkpoints=LONG)
    train(engine, 1, 1)
    assert "kept" not in {info.name for info in engine.checkpoints()}
    shutil.move(tmp_path / "kept", place)
    assert b"".join(chunk.data for chunk in engine.download(DownloadRequest("kept", file="state.json")))
    assert "kept" in {info.name for info in engine.checkpoints()}
    assert engine.restore(RestoreRequest("kept")).result(WAIT).step == 1


def test_a_listing_asks_the_journal_once_about_a_step_that_it_does_not_have(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    stop(rig)
    shutil.copytree(rig.folder, tmp_path / "later")
    later = Rig(tmp_path / "later")
    ahead = later.start(checkpoints=LONG)
    train(ahead, 1, 2)
    ahead.save(SaveRequest("later")).result(WAIT)
    stop(later)
    engine = rig.start(checkpoints=LONG)
    shutil.copytree(later.folder / "checkpoints" / "later", rig.folder / "checkpoints" / "later")
    asked: list[object] = []
    look_up = provenance.Provenance.look_up

    def counted(self: provenance.Provenance, *arguments: Any) -> None:
        asked.append(arguments)
        look_up(self, *arguments)

    monkeypatch.setattr(provenance.Provenance, "look_up", counted)
    for _ in range(3):
        assert "later" not in {info.name for info in engine.checkpoints()}
    assert len(asked) == 1


def test_export_takes_the_newest_of_the_run_and_asks_where_it_cannot_tell(
    rig: Rig, strangers: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = rig.start(checkpoints=LONG)
    train(engine, 0, 1)
    engine.save(SaveRequest("own")).result(WAIT)
    copy_in(strangers, rig)
    checkpoints = Checkpoints(rig.folder)
    code = weight_import_export.export(rig.folder, None, tmp_path / "out", to="maskwire", weights="auto")
    assert code == EXIT_RUN_DIRECTORY
    assert "name one with --checkpoint" in capsys.readouterr().err
    stop(rig)
    newest: Manifest = weight_import_export._newest(rig.folder, checkpoints)
    assert newest.info.name == "own"
