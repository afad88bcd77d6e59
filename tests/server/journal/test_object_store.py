"""Which stores are accepted, and what happens when the answer to a conditional create is lost."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from mirrors import MirroredRig

from maskwire_server.errors import ConfigError, StoreError
from maskwire_server.journal.object_store import ObjectStore


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


def test_a_store_without_conditional_create_is_refused(rig: MirroredRig) -> None:
    with pytest.raises(ConfigError, match="ftp:// has no conditional create"):
        ObjectStore("ftp://host/prefix")

    def overwrite(store: ObjectStore, name: str, data: bytes) -> None:
        store.put(name, data)

    with (
        mock.patch.object(ObjectStore, "create", overwrite),
        pytest.raises(ConfigError, match="If-None-Match"),
    ):
        rig.store.probe()
    rig.store.probe()
    assert rig.store.names("") == []


def test_a_probe_whose_answer_is_lost_succeeds_at_the_next_try(rig: MirroredRig) -> None:
    create, answers = ObjectStore._create, [OSError("the connection was reset")]

    def lose_the_first_answer(store: ObjectStore, name: str, data: bytes) -> None:
        create(store, name, data)
        if answers:
            raise answers.pop()

    store = rig.store
    store.patience = lambda _: True
    with mock.patch.object(ObjectStore, "_create", lose_the_first_answer):
        store.probe()
    assert not answers
    assert store.names("") == []


def test_objects_in_a_folder_are_flushed_with_their_names(rig: MirroredRig, tmp_path: Path) -> None:
    store, source, flushed = rig.store, tmp_path / "source", set()
    source.write_bytes(b"weights")

    def record(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)

    with mock.patch("os.fsync", record):
        store.create("a/created", b"1")
        store.put("b/written", b"2")
        store.put_file("c/file", source)
        store.copy("c/file", "d/copied")
    for name in ("a/created", "b/written", "c/file", "d/copied"):
        path = tmp_path / "mirror" / name
        assert {path.stat().st_ino, path.parent.stat().st_ino} <= flushed, name


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_a_store_without_its_package_is_refused_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    pytest.importorskip("fsspec", reason="needs the extra storage")
    monkeypatch.setitem(sys.modules, missing, None)
    imported = importlib.import_module("fsspec.registry")  # the attribute of that name is a mapping
    monkeypatch.delitem(imported._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"'s3://bucket/run' needs a package that is missing .*\[storage\]"):
        ObjectStore("s3://bucket/run")


def test_what_a_store_does_not_have_is_absent_and_no_error(rig: MirroredRig, tmp_path: Path) -> None:
    store, path = rig.store, tmp_path / "fetched"
    store.put("folder/a", b"1")
    assert store.get("folder/b") is None
    assert list(store.get_all(["folder/b", "folder/a", "c/d"])) == [None, b"1", None]
    assert not store.get_file("folder/b", path)
    assert not path.exists()
    assert store.names("c") == []
    store.delete("folder/b")
    assert store.names("") == ["folder/a"]


class Refusal(OSError):
    """As botocore raises it, with the answer of the store."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize("status", [412, 403])
@pytest.mark.parametrize("wrapped", [False, True])
def test_only_a_failed_condition_means_that_the_object_exists(
    rig: MirroredRig, status: int, wrapped: bool
) -> None:
    def refuse(*_: object) -> None:
        if not wrapped:
            raise Refusal(status)
        raise OSError("the store refused") from Refusal(status)

    error = FileExistsError if status == 412 else StoreError
    with mock.patch.object(ObjectStore, "_create", refuse), pytest.raises(error):
        rig.store.create("a", b"1")


def test_after_a_refusal_of_its_credentials_a_store_reads_them_again(rig: MirroredRig) -> None:
    store = rig.store
    connected = store._fs
    answers = [PermissionError("the token has expired")]
    store.patience = lambda _: True

    def refuse_once(store: ObjectStore, name: str) -> bytes:
        if answers:
            raise answers.pop()
        assert store._fs is not connected
        return b"1"

    with mock.patch.object(ObjectStore, "_get", refuse_once):
        assert store.get("a") == b"1"
