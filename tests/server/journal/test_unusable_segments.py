"""Segments that another version wrote, that were changed, or that are not this run's next one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mirrors import MirroredRig, mirror, segments, train
from rig import WAIT, FullDisk, wait_for

from maskwire_server.errors import FencedError, RunDirectoryError, StoreError
from maskwire_server.journal import restored_journal
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import NOTHING, SegmentWriter, resume
from maskwire_server.journal.mirror_segments import Change, Segment, segment_name
from maskwire_server.journal.object_store import ObjectStore

SEGMENT = Segment(
    "run-1", 1, "", "i", 1.25, "local", 3, 1, 2, (Change("events", "put", (1, 2.5, "kind", b"\0body", None)),)
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MirroredRig]:
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


def rewritten(data: bytes, head: dict[str, Any], row: list[Any] | None = None) -> bytes:
    """The segment with other fields or with another first row, under a hash that fits."""
    _, first, *rows = data.splitlines()
    lines = [json.dumps({**json.loads(first), **head}).encode(), *rows]
    if row is not None:
        lines[1] = json.dumps(row).encode()
    body = b"".join(line + b"\n" for line in lines)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_a_segment_that_is_written_again_as_it_is_stays_readable() -> None:
    assert Segment.decode(rewritten(SEGMENT.encode(), {})) == SEGMENT


@pytest.mark.parametrize(
    ("head", "row", "words"),
    [
        ({"format": 99}, None, "^a newer version of maskwire wrote the segment; use that version"),
        (
            {"compression": "zstd"},
            None,
            r"^a newer version of maskwire wrote it \(.*'compression'\); use that version",
        ),
        ({}, ["events", "put", 1, True, "kind", None, None], "^a value in a segment must be .*, got True"),
        ({}, ["events", "put", 1, [2], "kind", None, None], r"^a value in a segment must be .*, got \[2\]"),
    ],
)
def test_a_segment_of_a_newer_version_is_refused_with_what_is_new(
    head: dict[str, Any], row: list[Any] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Segment.decode(rewritten(SEGMENT.encode(), head, row))


def test_a_start_names_the_segment_that_a_newer_version_wrote(rig: MirroredRig) -> None:
    with closing(Journal(rig.folder / "run")) as journal:
        journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
        writer = resume(journal, rig.store, "local")
        rig.store.put(segment_name(writer.number + 1), rewritten(SEGMENT.encode(), {"format": 99}))
        with pytest.raises(
            RunDirectoryError, match=r"mirror: segment 2: a newer version of maskwire wrote the"
        ):
            resume(journal, rig.store, "local")


@pytest.mark.parametrize(("content", "instance"), [(SEGMENT.encode(), "i"), (b"changed", "unknown")])
def test_a_fenced_writer_names_the_other_one_if_its_segment_can_be_read(
    rig: MirroredRig, content: bytes, instance: str
) -> None:
    writer = SegmentWriter(rig.store, "run-1", "local", "one", 0, "")
    writer.compose(NOTHING)
    rig.store.put(segment_name(1), content)
    with pytest.raises(FencedError, match=rf"another server \(instance {instance}\) wrote segment 1: "):
        writer.send()


def test_a_segment_that_exists_and_cannot_be_read_is_tried_again(rig: MirroredRig) -> None:
    writer = SegmentWriter(rig.store, "run-1", "local", "one", 0, "")
    writer.compose(NOTHING)
    rig.store.put(segment_name(1), SEGMENT.encode())
    with (
        mock.patch.object(ObjectStore, "get", return_value=None),  # a store whose reads lag behind its writes
        pytest.raises(StoreError, match="segments/000000000001 exists but cannot be read"),
    ):
        writer.send()
    with pytest.raises(FencedError):
        writer.send()


@pytest.fixture(scope="module")
def mirror_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mirror of a run of three steps."""
    rig = MirroredRig(tmp_path_factory.mktemp("lost"))
    engine = rig.start()
    for step in range(3):
        train(engine, 1, first=step)
        wait_for(lambda step=step: mirror(engine).step == step + 1)  # type: ignore[misc]
    engine.drain(WAIT)
    engine.close()
    return rig.folder / "mirror"


@pytest.fixture
def lost(rig: MirroredRig, mirror_of_a_run: Path) -> MirroredRig:
    """A run of which there is only the mirror."""
    shutil.copytree(mirror_of_a_run, rig.folder / "mirror")
    return rig


NOT_NEXT = "the segment does not continue the previous one"


@pytest.mark.parametrize(
    ("number", "changes", "words"),
    [
        (2, {"number": 3}, NOT_NEXT),
        (2, {"previous": "0" * 64}, NOT_NEXT),
        (2, {"run_id": "another"}, NOT_NEXT),
        (1, {"changes": SEGMENT.changes}, "the segment must follow an upload of the complete journal"),
        (0, {"changes": (Change("unknown", "put", (1,)),)}, "'put' of 1 columns in table 'unknown'"),
        (0, {"changes": (Change("steps", "put", (1,)),)}, "'put' of 1 columns in table 'steps'"),
        (0, {"changes": (Change("run", "merge", ("a", 1)),)}, "'merge' of 2 columns in table 'run'"),
    ],
    ids=["number", "previous", "run", "no upload", "table", "columns", "kind"],
)  # fmt: skip
def test_a_restore_names_the_segment_that_does_not_fit(
    lost: MirroredRig, number: int, changes: dict[str, Any], words: str
) -> None:
    """Of that number, as the newest one; 0: the newest of the run."""
    names = sorted((lost.folder / "mirror/segments").iterdir())
    number = number or len(names)
    for path in names[number:]:
        path.unlink()
    changed = dataclasses.replace(segments(lost)[-1], **changes)
    names[number - 1].write_bytes(changed.encode())
    with pytest.raises(RunDirectoryError, match=rf"/segments/{number:012d}: ") as raised:
        lost.restore("other")
    assert words in str(raised.value)
    assert not (lost.folder / "other" / "journal.sqlite").exists()


def test_a_restore_without_room_on_the_disk_leaves_a_directory_for_the_next(lost: MirroredRig) -> None:
    full = FullDisk("database or disk is full")
    with (
        mock.patch.object(restored_journal, "apply", side_effect=full),
        pytest.raises(
            RunDirectoryError, match=r"the journal cannot be restored \(database or disk is full\)"
        ),
    ):
        lost.restore("other")
    assert lost.restore("other")
    with closing(Journal(lost.folder / "other")) as journal:
        assert len(list(journal.steps_after(1, 0))) == 3


def test_a_place_that_cannot_hold_a_restored_run_is_named(lost: MirroredRig) -> None:
    (lost.folder / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file/run: cannot be used as a run directory \(Not a dir"):
        lost.restore("file/run")
