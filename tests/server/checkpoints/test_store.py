"""A checkpoint is whole or absent, whatever fails while it is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from maskwire_server.checkpoints import download
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import Refused
from maskwire_server.manifest import Manifest
from maskwire_server.requests import DownloadRequest
from maskwire_server.results import CheckpointInfo


class Files:
    def write(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "optimizer.safetensors").write_bytes(b"moments" * 100)


def manifest(name: str = "a", step: int = 1, **changes: Any) -> Manifest:
    info = CheckpointInfo(name, 1, step, b"d" * 32, (), 100.0 + step, {"k": "v"})
    fields = {"run_id": "r", "automatic": True, "request_id": None, "configuration": {"x": 1}, "versions": {}}
    return Manifest(info, **{**fields, **changes})


def test_what_is_written_is_listed_verified_and_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.all() == []
    written = checkpoints.write(Files(), manifest())
    assert [file.name for file in written.info.files] == ["model.safetensors", "optimizer.safetensors"]
    assert written.info.size_bytes == 1400
    assert checkpoints.get("a") == written
    assert checkpoints.all() == [written]
    assert checkpoints.damage(written) is None


class Interrupted(BaseException):
    """As kill -9: nothing gets to clean up."""


def test_cut_off_at_any_flush_it_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, 0
    outcomes = []
    for fail_at in range(1, 12):
        calls = 0

        def failing(descriptor: int, fail_at: int = fail_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise Interrupted
            fsync(descriptor)

        run_dir = tmp_path / str(fail_at)
        run_dir.mkdir()
        checkpoints = Checkpoints(run_dir)
        monkeypatch.setattr(os, "fsync", failing)
        try:
            checkpoints.write(Files(), manifest())
            finished = True
        except Interrupted:
            finished = False
        monkeypatch.setattr(os, "fsync", fsync)
        found = checkpoints.all()
        assert all(checkpoints.damage(m) is None for m in found), "if it is there, it is whole"
        checkpoints.sweep()
        assert (checkpoints.path("a")).exists() == bool(found)
        outcomes.append((finished, bool(found)))
    assert (False, False) in outcomes
    assert outcomes[-1] == (True, True), "the loop went past the last flush"
    assert all(found for finished, found in outcomes if finished)


def test_a_full_disk_is_a_refusal_and_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        def write(self, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Refused, match="No space left on device") as raised:
        checkpoints.write(Full(), manifest())
    assert raised.value.reason == "CHECKPOINT_FAILED"
    assert not checkpoints.path("a").exists()
    checkpoints.write(Files(), manifest())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_and_named(tmp_path: Path, file: str, how: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    whole = checkpoints.write(Files(), manifest())
    path = checkpoints.path("a") / file
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    else:
        data[350] ^= 1
        path.write_bytes(data if how == "flip" else data[:-1])
    damage = checkpoints.damage(whole)
    assert damage is not None
    assert damage.startswith(file)


@pytest.mark.parametrize("position", range(0, 900, 60))
def test_a_manifest_with_a_flipped_bit_is_no_manifest(tmp_path: Path, position: int) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    path = checkpoints.path("a") / "manifest.json"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)
    try:
        found = checkpoints.all()
    except ValueError:  # pragma: no cover
        pytest.fail("a damaged manifest must not stop the listing")
    # Whitespace between tokens is not covered by the hash, and does not matter.
    assert found == [] or found[0].info.digest == b"d" * 32


def test_a_renamed_or_unknown_checkpoint_is_not_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    checkpoints.path("a").rename(checkpoints.path("b"))
    for name in ("a", "b", "../a", "A", ""):
        with pytest.raises(Refused) as raised:
            checkpoints.get(name)
        assert raised.value.reason == "CHECKPOINT_NOT_FOUND"


def test_deleting_takes_the_manifest_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    checkpoints.delete("a")
    assert checkpoints.all() == []
    assert not checkpoints.path("a").exists()


@pytest.mark.parametrize("content", ["notes.txt", "folder/notes.txt"])
def test_what_is_not_a_checkpoints_is_left_alone(tmp_path: Path, content: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    place = checkpoints.path("mine") / content
    place.parent.mkdir(parents=True)
    place.write_text("keep")
    assert checkpoints.sweep() == []
    with pytest.raises(Refused, match="exists but is not a checkpoint; choose another name"):
        checkpoints.write(Files(), manifest("mine"))
    assert place.read_text() == "keep"


def test_what_was_found_damaged_is_not_counted_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    written = checkpoints.write(Files(), manifest())
    (checkpoints.path("a") / "model.safetensors").write_bytes(b"other")
    assert checkpoints.verified(written), "it was read when it was written"
    with pytest.raises(Refused, match="does not match"):
        list(download.read(checkpoints, DownloadRequest("a")))
    assert not checkpoints.verified(written)


def test_what_cannot_be_set_aside_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    place = checkpoints.path("a") / "manifest.json"
    place.write_bytes(b"{}")
    monkeypatch.setattr(checkpoints, "set_aside", fail)
    with pytest.raises(Refused, match="could not be written"):
        checkpoints.write(Files(), manifest())
    assert (checkpoints.path("a") / "model.safetensors").exists()


def fail(name: str) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_kill_in_the_middle_of_a_file_leaves_is_swept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    cut_off = checkpoints.path("b")
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"weights")
    (cut_off / ".tmpX3bR9q").write_bytes(b"mom")  # safetensors' own name, before it renames the file
    assert checkpoints.sweep() == ["b"]
    assert [found.info.name for found in checkpoints.all()] == ["a"]


def test_what_a_restore_goes_back_to_stays_unless_the_restore_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    assert checkpoints.pin("a", "it is restored").info.name == "a"
    for _ in range(2):
        checkpoints.pin("a", "it is copied")
    assert checkpoints.delete("a") == "it is restored"
    checkpoints.unpin("a", "it is restored")
    checkpoints.unpin("a", "it is copied")
    assert checkpoints.delete("a") == "it is copied"
    checkpoints.unpin("a", "it is copied")
    assert checkpoints.delete("a") == ""
    assert not checkpoints.path("a").exists()
    with pytest.raises(Refused, match="no checkpoint"):
        checkpoints.pin("a", "it is restored")


def test_what_is_read_stays_and_a_minute_longer_for_the_next_file(tmp_path: Path) -> None:
    now = 0.0
    checkpoints = Checkpoints(tmp_path, clock=lambda: now)
    checkpoints.write(Files(), manifest())
    with checkpoints.reading("a"), checkpoints.reading("a"):
        assert checkpoints.delete("a") == "it is being downloaded"
    now = 59.9
    assert checkpoints.delete("a") == "it was downloaded in the last minute"
    now = 60.1
    assert checkpoints.delete("a") == ""
    with pytest.raises(Refused, match="no checkpoint"), checkpoints.reading("a"):
        pass


def test_a_whole_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.write(Files(), manifest())
    with pytest.raises(Refused, match="is taken"):
        checkpoints.write(Files(), manifest())
    assert checkpoints.all() == [first]
