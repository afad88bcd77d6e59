"""A checkpoint is whole or absent, whatever fails while it is written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from maskwire_server.checkpoints import download
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import Refused
from maskwire_server.manifest import Manifest
from maskwire_server.requests import DownloadRequest
from maskwire_server.results import FROZEN_FILE, CheckpointInfo


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
    with pytest.raises(Refused, match="exists; choose another name"):
        checkpoints.write(Files(), manifest())
    assert checkpoints.all() == [first]


@contextlib.contextmanager
def too_many_open_files(name: str) -> Iterator[None]:
    """Files of this name cannot be opened, although they are intact."""
    open_file = io.open

    def limited(file: Any, *arguments: Any, **options: Any) -> Any:
        if Path(str(file)).name == name:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_file(file, *arguments, **options)

    with mock.patch("io.open", limited):
        yield


@pytest.mark.parametrize(
    ("file", "call"),
    [
        ("model.safetensors", lambda store: store.damage(store.get("a"))),
        ("manifest.json", lambda store: store.damage(store.own()[0])),
        ("manifest.json", lambda store: store.unreadable()),
        ("model.safetensors", lambda store: [*download.read(store, DownloadRequest("a"))]),
        ("optimizer.safetensors", lambda store: store.write(Files(), manifest("b"))),
    ],
    ids=["damage", "manifest", "unreadable", "download", "write"],
)
def test_too_many_open_files_are_no_damage(tmp_path: Path, file: str, call: Any) -> None:
    checkpoints = Checkpoints(tmp_path)
    whole = checkpoints.write(Files(), manifest())
    with too_many_open_files(file), pytest.raises(OSError, match="Too many open files"):
        call(checkpoints)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["a"]
    assert checkpoints.damage(whole) is None
    assert checkpoints.unreadable() == {}


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"file": "critic.safetensors"}, "CHECKPOINT_NOT_FOUND", "its files: model.safetensors, optimi"),
        ({"file": "model.safetensors", "offset": 701}, "INVALID_FIELD", "700, the file's size, got 701"),
    ],
    ids=["file", "offset"],
)
def test_a_download_of_what_a_checkpoint_does_not_have_is_refused(
    tmp_path: Path, fields: dict[str, Any], reason: str, words: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    with pytest.raises(Refused, match=words) as raised:
        list(download.read(checkpoints, DownloadRequest("a", **fields)))
    assert raised.value.reason == reason


def test_the_rest_of_a_file_is_downloaded_and_compared_by_its_size(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    request = DownloadRequest("a", file="model.safetensors", offset=600)
    [chunk] = download.read(checkpoints, request)
    assert (chunk.offset, chunk.data) == (600, (b"weights" * 100)[600:])
    path = checkpoints.path("a") / "model.safetensors"
    path.write_bytes(b"weights" * 99)
    with pytest.raises(Refused, match=r"model\.safetensors: does not match the manifest's size"):
        list(download.read(checkpoints, request))
    path.unlink()
    with pytest.raises(Refused, match=r"model\.safetensors: No such file or directory; download") as raised:
        list(download.read(checkpoints, request))
    assert raised.value.reason == "CHECKPOINT_DAMAGED"


def test_a_download_of_the_weights_alone_has_the_manifest_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    chunks = download.read(checkpoints, DownloadRequest("a", weights_only=True))
    assert [chunk.file.name for chunk in chunks] == ["model.safetensors", "manifest.json"]


def test_a_save_replaces_what_an_interrupted_one_left_under_its_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path("a").mkdir(parents=True)
    (checkpoints.path("a") / "critic.safetensors").write_bytes(b"half")
    written = checkpoints.write(Files(), manifest())
    assert [file.name for file in written.info.files] == ["model.safetensors", "optimizer.safetensors"]


class Adapters:
    """Weights that are never trained: a save writes them unless they are there already."""

    def write(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"adapters")
        if not (folder / FROZEN_FILE).exists():
            (folder / FROZEN_FILE).write_bytes(b"frozen" * 100)


@pytest.mark.parametrize("links", [2, 1])
def test_weights_that_are_never_trained_are_stored_once_where_the_disk_has_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: int
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Adapters(), manifest())
    if links == 1:
        error = OSError(errno.EOPNOTSUPP, "Operation not supported")
        monkeypatch.setattr(Path, "hardlink_to", mock.Mock(side_effect=error))
    second = checkpoints.write(Adapters(), manifest("b", 2))
    frozen = checkpoints.path("b") / FROZEN_FILE
    assert (frozen.stat().st_nlink, frozen.read_bytes()) == (links, b"frozen" * 100)
    assert checkpoints.damage(second) is None


def test_what_is_set_aside_again_gets_a_name_of_its_own(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    asides = []
    for _ in range(3):
        checkpoints.write(Files(), manifest())
        asides.append(checkpoints.set_aside("a"))
    assert asides == ["a.aside", "a.aside_", "a.aside__"]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == asides


def test_what_cannot_be_swept_is_named_and_the_rest_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for name in ("a", "b"):
        checkpoints.path(name).mkdir(parents=True)
    remove = shutil.rmtree

    def refuse(path: Path) -> None:
        if path.name == "a":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert checkpoints.sweep() == ["b"]
    assert "the unfinished checkpoint a could not be removed: [Errno 1] Operation not perm" in caplog.text
    assert [path.name for path in checkpoints.folder.iterdir()] == ["a"]


def test_a_checkpoint_whose_folder_is_gone_counts_as_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Files(), manifest())
    shutil.rmtree(checkpoints.path("a"))
    assert checkpoints.delete("a") == ""
