"""Which stores are accepted, and what happens when the answer to a conditional create is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from mirrors import MirroredRig

from maskwire_server.errors import ConfigError
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
