"""Checkpoints in a mirror that are damaged, incomplete, or gone where the run is served."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from mirrors import MirroredRig, down, lose_the_machine, mirror, train
from rig import WAIT, reason, wait_for

from maskwire_server.checkpoints.mirrored_checkpoints import MirroredCheckpoints
from maskwire_server.engine import checkpoint_uploader
from maskwire_server.errors import FencedError
from maskwire_server.journal.mirror_segments import Segment
from maskwire_server.journal.records import Lineage
from maskwire_server.requests import SaveRequest


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MirroredRig]:
    monkeypatch.setattr(checkpoint_uploader, "RETRY_SECONDS", 0.05)
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"state"', b'"staTe"'))


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()  # reading it raises an error of the operating system


@pytest.mark.parametrize("damage", [changed, Path.unlink, unreadable])
@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_a_damaged_checkpoint_is_refused_and_named_and_keeps_no_other_from_the_mirror(
    local: MirroredRig, acknowledge: str, damage: Callable[[Path], None]
) -> None:
    local.acknowledge = acknowledge
    engine = local.start(checkpoints={"every_steps": 1000})
    saves = []
    with down("put_file"):
        for step, name in enumerate(("older", "newer")):
            train(engine, 1, first=step)
            folder = local.folder / "run" / "checkpoints" / name
            saves.append(engine.save(SaveRequest(name, name)))
            wait_for((folder / "manifest.json").exists)
            wait_for(lambda: not engine._saves.busy)
        damage(folder / "state.json")
    words = "checkpoint 'newer' cannot be copied to the mirror: its file state.json is missing or"
    wait_for(lambda: mirror(engine).problem.startswith(words))
    assert mirror(engine).checkpoint == "older"
    assert saves[0].result(WAIT).name == "older"
    if acknowledge == "local":
        assert saves[1].result(WAIT).name == "newer"
    else:
        for save in (saves[1], engine.save(SaveRequest("newer", "newer"))):
            assert reason(save) == "CHECKPOINT_FAILED"
            assert str(save.exception()).startswith(words)
    assert engine.save(SaveRequest("newest")).result(WAIT).name == "newest"  # sets the damaged one aside
    wait_for(lambda: mirror(engine).checkpoint == "newest" and mirror(engine).problem == "")


def test_a_checkpoint_that_lacks_a_file_in_the_mirror_is_passed_over(local: MirroredRig) -> None:
    engine = local.start()
    train(engine, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    train(engine, 2, first=2)
    engine.drain(WAIT)
    lose_the_machine(local, engine)
    newest = sorted((local.folder / "mirror" / "checkpoints").glob("step-000000004*"))[0]
    (newest / "state.json").unlink()
    assert local.restore("run")
    again = local.start()
    assert again.status().durable_step == 4
    assert [info.name for info in again.checkpoints()] == ["two", "step-000000000"]


def unfinished_upload(rig: MirroredRig, name: str) -> Path:
    """What is in the mirror of a checkpoint whose upload was cut off."""
    folder = rig.folder / "mirror" / "checkpoints" / f"{name}.0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    return folder / "state.json"


@pytest.mark.parametrize("restored", [True, False], ids=["restored", "restarted"])
def test_what_an_earlier_server_left_of_an_upload_is_announced_and_deleted(
    local: MirroredRig, restored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = local.start()
    train(engine, 2)
    engine.drain(WAIT)
    engine.close()
    left = unfinished_upload(local, "step-000000001")
    stranger = left.parents[1] / "notes" / "state.json"
    stranger.parent.mkdir()
    stranger.write_text("not an upload of a checkpoint")
    if restored:
        shutil.rmtree(local.folder / "run")
        assert local.restore("run")
    again = local.start()
    begun_later = unfinished_upload(local, "step-000000003")
    wait_for(lambda: not left.exists())
    segments = sorted((local.folder / "mirror" / "segments").glob("*[0-9]"))
    announced = [name for path in segments for name in Segment.decode(path.read_bytes()).deletes]
    assert "checkpoints/step-000000001.0123456789abcdef" in announced
    assert "step-000000001.0123456789abcdef is deleted: a server was lost" in caplog.text
    train(again, 2, first=2)
    again.drain(WAIT)
    assert begun_later.exists(), "a later server may be writing it"
    assert stranger.exists()


def test_a_fenced_server_deletes_no_unfinished_upload(
    local: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = unfinished_upload(local, "step-000000001")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_uploader.CheckpointUploader, "_copy", lambda _: None)
        engine = local.start()
        train(engine, 1)
        wait_for(lambda: mirror(engine).step == 1)
        assert local.restore("other")
    assert engine._mirror is not None
    engine._mirror.saved()
    wait_for(lambda: bool(local.fatal))
    assert isinstance(local.fatal[0], FencedError)
    assert left.exists()


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_a_checkpoint_with_a_file_missing_in_the_mirror_is_uploaded_again(
    local: MirroredRig, file: str
) -> None:
    """Such as one that a fenced server went on uploading while its files were deleted."""
    engine = local.start()
    train(engine, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    engine.drain(WAIT)
    engine.close()
    (gone,) = (local.folder / "mirror" / "checkpoints").glob(f"two.*/{file}")
    gone.unlink()
    again = local.start()
    wait_for(lambda: again.status().mirror.checkpoint == "two")  # type: ignore[union-attr]
    assert gone.exists()
    assert again._mirror is not None
    copies, run = again._mirror._copies, again._run
    with mock.patch.object(copies, "_checkpoints", mock.Mock(own=list)):
        assert not [name for name in copies.collectable(run.lineages, 1, batches=False) if "two" in name]


def test_a_file_that_two_checkpoints_share_is_uploaded_again_once_it_is_gone_there(
    local: MirroredRig, caplog: pytest.LogCaptureFixture
) -> None:
    engine = local.start(checkpoints={"every_steps": 1000})
    train(engine, 1)
    engine.save(SaveRequest("first")).result(WAIT)
    wait_for(lambda: mirror(engine).checkpoint == "first")
    folder = local.folder / "mirror" / "checkpoints"
    (lost,) = folder.glob("first.*/state.json")
    content = lost.read_bytes()
    lost.unlink()
    engine.save(SaveRequest("second")).result(WAIT)  # of the same step, so with the same file
    wait_for(lambda: mirror(engine).checkpoint == "second")
    assert f"{lost.parent.name}/state.json is missing: the checkpoint is not used" in caplog.text
    engine.save(SaveRequest("third")).result(WAIT)
    wait_for(lambda: mirror(engine).checkpoint == "third")
    engine.drain(WAIT)
    for name in ("first", "second", "third"):
        assert [path.read_bytes() for path in folder.glob(f"{name}.*/state.json")] == [content], name
    assert (mirror(engine).problem, mirror(engine).failures) == ("", 0)


def test_what_a_start_from_the_mirror_may_need_stays_though_it_is_gone_here(local: MirroredRig) -> None:
    engine = local.start()
    for step in range(3):
        train(engine, 1, first=step)
        engine.save(SaveRequest(f"at-{step + 1}")).result(WAIT)
    engine.drain(WAIT)
    copies = MirroredCheckpoints(local.store, mock.Mock(own=list))
    copies.load({folder: manifest for folder, (manifest, _) in copies.read_all().items()})
    run = engine._run
    gone = copies.collectable(run.lineages, 1, batches=False)
    assert sorted(name.split("/")[1].split(".")[0] for name in gone) == ["at-1", "step-000000000"]
    parent = Lineage(2, 1, 1, b"d" * 32, None, "at-1")
    gone = copies.collectable({**run.lineages, 2: parent}, 2, batches=False)
    kept = {"at-1", "step-000000000"}  # the two newest of this ancestry, and where it started
    assert not kept & {name.split("/")[1].split(".")[0] for name in gone}
