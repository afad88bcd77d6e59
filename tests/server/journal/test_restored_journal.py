"""What a restore brings back when servers were lost in the middle of something, and what it says is lost."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from mirrors import (
    MirroredRig,
    down,
    lose_the_machine,
    mirror,
    restored,
    segments,
    steps,
    tables,
    train,
    upload_all,
)
from rig import WAIT, Rig, wait_for

from maskwire_server import config, failpoints
from maskwire_server.engine import checkpoint_uploader
from maskwire_server.engine import mirror as engine_mirror
from maskwire_server.errors import RunDirectoryError, StoreError
from maskwire_server.journal import outbox, restored_journal
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import resume
from maskwire_server.journal.mirror_segments import Segment, hash_of
from maskwire_server.recovery import from_mirror
from maskwire_server.requests import RestoreRequest, SaveRequest

NONE_LOST = "no acknowledged step is lost"


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MirroredRig]:
    monkeypatch.setattr(engine_mirror, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(engine_mirror, "START_RETRY_SECONDS", 0.05)
    rig = MirroredRig(tmp_path, "mirrored")
    yield rig
    rig.close()


def killed_at(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(name: str) -> None:
        if name == place:
            raise Killed

    monkeypatch.setattr(failpoints, "_action", kill)


def a_run_that_was_served_without_its_mirror(rig: MirroredRig, **sections: object) -> None:
    """Six steps in the mirror, and two that only the run directory has."""
    engine = rig.start(**sections)
    train(engine, 6)
    engine.drain(WAIT)
    engine.close()
    alone = Rig(rig.folder / "run").start(**sections)  # type: ignore[arg-type]
    train(alone, 2, first=6)
    alone.drain(WAIT)
    alone.close()


@pytest.mark.parametrize("older", [False, True], ids=["", "of an older version"])
@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_until_the_run_is_uploaded_again_what_the_mirror_had_is_restored(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch, acknowledge: str, older: bool
) -> None:
    """Lost after any of the segments, and once more while the restored run is uploaded."""
    monkeypatch.setattr(outbox, "_PAGE", 4)
    a_run_that_was_served_without_its_mirror(rig)
    rig.acknowledge = acknowledge
    for number, last in enumerate(upload_all(rig)):
        copy = MirroredRig(rig.folder / str(number), acknowledge)
        shutil.copytree(rig.folder / "mirror", copy.folder / "mirror")
        if older:
            as_written_before(copy)
        words = restored(copy, "run")
        if last:
            assert steps(copy, "run") == 8
            break
        assert steps(copy, "run") == 6
        assert ("a later upload of the complete journal was not finished" in words) == (number > 0)
        if number > 0 or not older:  # what an older version wrote at a start says too little
            assert "steps from 7 on that were acknowledged after that are lost" in words
        for _ in itertools.islice(upload_all(copy), number):
            pass
        assert NONE_LOST not in restored(copy, "again") or (older and not number)
        assert steps(copy, "again") == 6
    assert number >= 6


def test_a_run_restored_beside_an_unfinished_upload_is_continued_and_restored(
    rig: MirroredRig, tmp_path: Path
) -> None:
    a_run_that_was_served_without_its_mirror(rig)
    list(itertools.islice(upload_all(rig), 4))
    shutil.rmtree(tmp_path / "run")
    rig.acknowledge = "local"
    assert rig.restore("run")
    engine = rig.start()
    train(engine, 3, first=6)
    wait_for(lambda: mirror(engine).step == 9)
    digest = engine.status().digest
    lose_the_machine(rig, engine)
    assert rig.restore("run")
    again = rig.start()
    assert (again.status().durable_step, again.status().digest) == (9, digest)


@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_a_new_upload_counts_only_with_a_checkpoint_that_its_batches_continue(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch, acknowledge: str
) -> None:
    """Batches that were dropped while there was no mirror are nowhere."""
    settings = {"checkpoints": {"every_steps": 1000, "keep_last": 2}}
    a_run_that_was_served_without_its_mirror(rig, **settings)
    alone = Rig(rig.folder / "run").start(**settings)
    for name, first in (("older", 8), ("newer", 12)):
        train(alone, 4, first=first)
        alone.save(SaveRequest(name)).result(WAIT)
    alone.drain(WAIT)
    alone.close()
    assert len(tables(rig.folder / "run")["payloads"]) < 6
    rig.acknowledge = acknowledge
    # Later uploads of checkpoints do not come in time.
    monkeypatch.setattr(checkpoint_uploader.CheckpointUploader, "_copy", lambda _: None)
    engine = rig.start(**settings)
    wait_for(lambda: segments(rig)[-1].number > 1 and mirror(engine).step == 16)
    wait_for(lambda: any(segment.ends_upload for segment in segments(rig)[-2:]))
    digest = engine.status().digest
    lose_the_machine(rig, engine)
    assert rig.restore("run")
    again = rig.start(**settings)
    assert (again.status().durable_step, again.status().digest) == (16, digest)


def test_what_a_recorded_lineage_starts_from_is_uploaded_first_at_a_start(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.acknowledge = "local"
    engine = rig.start(checkpoints={"every_steps": 1000})
    wait_for(lambda: mirror(engine).checkpoint == "step-000000000")
    monkeypatch.setattr(checkpoint_uploader.CheckpointUploader, "_copy", lambda _: None)
    train(engine, 3)
    engine.save(SaveRequest("three")).result(WAIT)
    train(engine, 3, first=3)
    wait_for(lambda: mirror(engine).step == 6)
    with down():
        engine.restore(RestoreRequest("three", "id")).result(WAIT)
        engine.close()
    rig.acknowledge = "mirrored"
    rig.start(checkpoints={"every_steps": 1000})
    assert list((rig.folder / "mirror" / "checkpoints").glob("three.*/manifest.json"))


def test_each_segment_of_a_whole_upload_exceeds_its_size_by_one_batch_at_most(rig: MirroredRig) -> None:
    with closing(Journal(rig.folder / "run")) as journal:
        journal.create({"run_id": "run-1", "seed": 0, "canonical": b"{}"}, b"d" * 32)
        batches = [(1, step, bytes([step]) * 3000) for step in range(1, 13)]
        write = partial(journal._db.executemany, "INSERT INTO payloads VALUES (?, ?, ?)", batches)
        journal.transaction(write)
    list(upload_all(rig, 10_000))
    sizes = [sum(size for each in segment.batches for _, size in each.steps) for segment in segments(rig)]
    assert sum(sizes) == 12 * 3000
    assert max(sizes) == 4 * 3000
    assert rig.restore("other")
    assert sorted(tables(rig.folder / "other")["payloads"]) == batches


# What is said to be lost.


@pytest.mark.parametrize("acknowledge", ["local", "mirrored"])
def test_a_restore_logs_what_the_status_says_of_it(
    rig: MirroredRig, caplog: pytest.LogCaptureFixture, acknowledge: str
) -> None:
    caplog.set_level("INFO", from_mirror.__name__)
    rig.acknowledge = acknowledge
    engine = rig.start()
    train(engine, 3)
    wait_for(lambda: mirror(engine).step == 3)
    lose_the_machine(rig, engine)
    seen = config.load(None, storage={"mirror": rig.address, "acknowledge": acknowledge},
                       run={"dir": str(rig.folder / "run")})  # fmt: skip
    for _ in range(2):  # the second time, the directory holds the run
        with mock.patch.object(from_mirror.recorded_config, "completed"):
            from_mirror.restore_journal(seen, rig.store, threading.Event())
    (record,) = [each for each in caplog.records if each.name == from_mirror.__name__]
    words = mirror(rig.start()).restored
    assert words.startswith("step 3 (lineage 1), segment ")
    assert record.getMessage() == f"the run was restored from {rig.address}: {words}"
    assert record.levelname == ("INFO" if acknowledge == "mirrored" else "WARNING")


def test_a_start_that_confirms_nothing_promises_nothing(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local server's steps are lost, however many servers with `mirrored` start and are killed."""
    rig.acknowledge = "local"
    engine = rig.start()
    wait_for(lambda: mirror(engine).segment > 1)
    with down():
        train(engine, 5)
        lose_the_machine(rig, engine)
    rig.acknowledge = "mirrored"
    for _ in range(2):
        with monkeypatch.context() as patch:
            killed_at("mirror.restoring", patch)
            with pytest.raises(Killed):
                rig.restore("run")
    assert restored(rig, "run").endswith("steps from 1 on that were acknowledged after that are lost")
    second = rig.start()
    train(second, 4)
    lose_the_machine(rig, second)
    words = restored(rig, "run")
    assert words.startswith("step 4 ")
    assert words.endswith(
        "no step acknowledged since the last restore is lost; earlier restores lost what was acknowledged "
        "after step 0"
    )


def test_after_local_steps_a_mirrored_server_promises_nothing_until_all_are_uploaded(
    rig: MirroredRig,
) -> None:
    """Lost after any of the segments that it writes before it serves."""
    rig.acknowledge = "local"
    engine = rig.start()
    train(engine, 2)
    wait_for(lambda: mirror(engine).step == 2)
    with down():
        train(engine, 20, first=2)
        engine.close()
    before = len(segments(rig))
    rig.acknowledge = "mirrored"
    rig.start(storage={"segment_bytes": 1024}).close()
    written = segments(rig)[before:]
    assert len(written) > 4
    for count in range(1, len(written) + 1):
        copy = MirroredRig(rig.folder / str(count), "mirrored")
        shutil.copytree(rig.folder / "mirror", copy.folder / "mirror")
        for path in sorted((copy.folder / "mirror" / "segments").glob("*[0-9]"))[before + count :]:
            path.unlink()
        words = restored(copy, "run")
        if count == len(written):
            assert words.endswith(NONE_LOST)
        else:
            found = steps(copy, "run")
            assert f"steps from {found + 1} on that were acknowledged after that are lost" in words


def test_once_a_mirrored_server_serves_no_acknowledged_step_is_lost(rig: MirroredRig) -> None:
    rig.acknowledge = "local"
    engine = rig.start()
    train(engine, 2)
    engine.drain(WAIT)
    engine.close()
    rig.acknowledge = "mirrored"
    lose_the_machine(rig, rig.start())
    assert NONE_LOST in restored(rig, "run")


def test_a_kill_while_the_run_is_read_for_its_upload_hides_no_time_without_a_mirror(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start before the claim is killed, then the one after it: the third must still know."""
    a_run_that_was_served_without_its_mirror(rig)
    for place in ("mirror.claiming", "mirror.claimed"):
        with monkeypatch.context() as patch, closing(Journal(rig.folder / "run")) as journal:
            killed_at(place, patch)
            with pytest.raises(Killed):
                resume(journal, rig.store, "mirrored")
    shutil.rmtree(rig.folder / "run")
    assert "steps from 7 on that were acknowledged after that are lost" in restored(rig, "run")


def as_written_before(rig: MirroredRig) -> None:
    """Write the segments as a version did that recorded no promises."""
    previous, encode = "", Segment.encode

    def without(segment: Segment) -> bytes:
        kept = {name: value for name, value in vars(segment).items() if name not in ("lossless", "lost")}
        older = mock.Mock(**kept)
        older.__dict__ = {**kept}
        return encode(older)

    for path in sorted((rig.folder / "mirror" / "segments").glob("*[0-9]")):
        segment = dataclasses.replace(Segment.decode(path.read_bytes()), previous=previous)
        data = without(segment)
        assert b"loss" not in data.splitlines()[1]
        path.write_bytes(data)
        previous = hash_of(data)


@pytest.mark.parametrize(("acknowledge", "words"), [
    ("mirrored", NONE_LOST), ("local", "steps from 6 on that were acknowledged after that are lost"),
])  # fmt: skip
def test_a_mirror_of_an_older_version_is_restored(rig: MirroredRig, acknowledge: str, words: str) -> None:
    rig.acknowledge = acknowledge
    engine = rig.start()
    train(engine, 5)
    wait_for(lambda: mirror(engine).step == 5)
    digest = engine.status().digest
    lose_the_machine(rig, engine)
    as_written_before(rig)
    assert words in restored(rig, "run")
    again = rig.start()
    assert (again.status().durable_step, again.status().digest) == (5, digest)


def test_a_store_that_fails_during_a_restore_leaves_no_draft(rig: MirroredRig) -> None:
    rig.start().close()
    with down("names"), pytest.raises(StoreError):
        rig.restore("other")
    with (
        mock.patch.object(restored_journal, "_newest", return_value=2),
        down("names"),
        pytest.raises(StoreError),
    ):
        rig.restore("other")
    assert sorted(path.name for path in (rig.folder / "other").iterdir()) == ["lock"]


@pytest.mark.parametrize("content", [b"changed", None])
def test_batches_that_the_store_lost_are_passed_over_if_a_checkpoint_covers_them(
    rig: MirroredRig, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine = rig.start()
    train(engine, 3)
    engine.save(SaveRequest("three")).result(WAIT)
    digest = engine.status().digest
    lose_the_machine(rig, engine)
    (object_,) = (rig.folder / "mirror" / "batches").glob("*-1-3-3-*")
    object_.unlink() if content is None else object_.write_bytes(content)
    assert rig.restore("run")
    assert f"{object_.name} {'is missing' if content is None else 'does not match its hash'}" in caplog.text
    again = rig.start()
    assert (again.status().durable_step, again.status().digest) == (3, digest)


def test_what_a_killed_restore_left_is_deleted_by_the_next(
    rig: MirroredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    train(engine, 2)
    lose_the_machine(rig, engine)
    killed_at("mirror.claimed", monkeypatch)
    with pytest.raises(Killed):
        rig.restore("run")
    (rig.folder / "run" / f"{restored_journal._DRAFT}.9").write_bytes(b"of a killed restore")
    monkeypatch.undo()
    assert rig.restore("run")
    assert not list((rig.folder / "run").glob(f"{restored_journal._DRAFT}*"))


@pytest.mark.parametrize("content", [b"changed", None])
def test_a_start_whose_newest_segment_was_changed_says_so(rig: MirroredRig, content: bytes | None) -> None:
    rig.start().close()
    newest = max((rig.folder / "mirror" / "segments").iterdir())
    newest.unlink() if content is None else newest.write_bytes(content)
    again = rig.start(wait=False)
    with pytest.raises(
        RunDirectoryError, match=r"segment \d+, which this run wrote, is missing or was changed"
    ):
        again.wait_serving(WAIT)
