"""A full disk, or a used-up quota: training is held, and goes on by itself when there is room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import WAIT, Rig, bare, make_engine, payload, reason, wait_for

from maskwire.v1.values import RunState
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.checkpoints import files
from maskwire_server.engine.engine import Engine
from maskwire_server.journal import disk, reserve
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.reserve import Reserve, free_log_space
from maskwire_server.requests import SaveRequest, StepRequest

LONG = {"every_seconds": 1e9, "keep_last": 2}
TESTS = Path(__file__).resolve().parents[2]


def large(step: int) -> StepRequest:
    """A batch of 16 KiB."""
    return StepRequest(Payload(Batch(np.full((32, 512), 20 + step % 200, np.uint8), 32, 512), Modes()))


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


def fill(place: Path) -> Path:
    """Fill the disk at once: what a merge of the log frees later stays free."""
    filler = place / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.free_bytes(place))
    return filler


def grow_a_log_over_dropped_batches(engine: Engine, count: int) -> None:
    """Drop batches whose pages later ones reuse, so that merging the log does not enlarge the database."""
    for step in range(count):
        engine.train_step(large(step)).result(WAIT)
    for name in ("one", "two"):
        engine.save(SaveRequest(name)).result(WAIT)
        engine.train_step(bare(1)).result(WAIT)


def test_a_large_log_is_merged_and_training_goes_on_though_the_disk_is_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(small_disk / "run")
    grow_a_log_over_dropped_batches(rig.start(checkpoints=LONG, serve={"reserve_bytes": 0}), 100)
    rig.engines.pop().close()  # merges
    monkeypatch.setattr(reserve, "MERGE_BYTES", 2**40)
    engine = rig.start(checkpoints=LONG, serve={"reserve_bytes": 0})
    for step in range(60):
        engine.train_step(large(step)).result(WAIT)
    wal = small_disk / "run" / "journal.sqlite-wal"
    assert wal.stat().st_size > 2**20
    fill(small_disk)
    assert disk.free_bytes(small_disk) < wal.stat().st_size
    before = engine.status().step
    assert engine.train_step(bare(2)).result(WAIT).step == before + 1
    assert engine.status().state is RunState.SERVING
    assert wal.stat().st_size < 2**20
    engine.close()


def test_what_was_computed_when_the_disk_filled_up_is_committed_by_merging(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(small_disk / "run")
    grow_a_log_over_dropped_batches(rig.start(checkpoints=LONG, serve={"reserve_bytes": 0}), 100)
    rig.engines.pop().close()
    monkeypatch.setattr(reserve, "MERGE_BYTES", 2**40)
    engine = rig.start(checkpoints=LONG, serve={"reserve_bytes": 0})
    for step in range(60):
        engine.train_step(large(step)).result(WAIT)
    before = engine.status().step
    rig.trainer.gate.clear()
    computed = engine.train_step(large(7))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    fill(small_disk)
    rig.trainer.gate.set()
    assert computed.result(WAIT).step == before + 1
    wait_for(lambda: engine.status().state is RunState.SERVING)
    engine.close()


def test_a_log_is_not_merged_where_the_database_has_no_room_to_grow(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "run")
    engine = rig.start()
    for step in range(20):
        engine.train_step(large(step)).result(WAIT)
    copy = tmp_path / "copy"  # with its log, as after a kill
    shutil.copytree(rig.folder, copy)
    engine.close()
    journal = Journal(copy)
    waiting, growth = journal.log_bytes(), journal.growth()
    assert 0 < growth <= waiting
    size = (copy / "journal.sqlite").stat().st_size

    class Room(Reserve):
        room = growth - 1

        def fits(self, size: int) -> bool:
            return size <= self.room

    kept = Room(copy, 0)
    assert not free_log_space(journal, kept)
    assert journal.log_bytes() == waiting
    kept.room = growth
    assert free_log_space(journal, kept)
    assert journal.log_bytes() == 0
    assert (copy / "journal.sqlite").stat().st_size == size + growth
    assert not free_log_space(journal, kept), "an empty log frees nothing"
    journal.close()


def test_the_log_is_merged_by_its_bytes_not_by_the_number_of_commits(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[int] = []
    merge_log = Journal.merge_log

    def counted(self: Journal, *, truncate: bool = False) -> None:
        merges.append(self.log_bytes())
        merge_log(self, truncate=truncate)

    monkeypatch.setattr(Journal, "merge_log", counted)
    monkeypatch.setattr(reserve, "MERGE_BYTES", 2**20)
    engine = rig.start()
    for step in range(200):
        engine.train_step(large(step)).result(WAIT)
    assert 4 <= len(merges) <= 10
    assert all(2**20 <= size < 2**20 + 2**18 for size in merges), merges


def test_a_start_on_a_full_disk_waits_for_room(small_disk: Path) -> None:
    rig = Rig(small_disk / "run")
    sections: dict[str, Any] = {"checkpoints": LONG, "serve": {"reserve_bytes": 0}}
    engine = rig.start(**sections)
    digest = engine.train_step(bare(0)).result(WAIT).digest
    engine.close()
    shutil.rmtree(small_disk / "run" / "checkpoints")  # so that it has to write one again
    filler = fill(small_disk)
    whole = rig.config(**sections)
    engine = make_engine(rig.folder, whole, on_fatal=rig.fatal.append)
    wait_for(lambda: engine.status().waiting_for == "space on the disk")
    assert engine.status().state is RunState.RECOVERING
    filler.unlink()
    engine.wait_serving(WAIT)
    assert engine.status().digest == digest
    assert engine.train_step(bare(1)).result(WAIT).step == 2
    engine.close()
    assert rig.fatal == []


def test_a_new_run_on_a_full_disk_waits_for_room(small_disk: Path) -> None:
    rig = Rig(small_disk / "run")
    filler = fill(small_disk)
    engine = make_engine(rig.folder, rig.config(serve={"reserve_bytes": 0}), on_fatal=rig.fatal.append)
    wait_for(lambda: engine.status().waiting_for == "space on the disk")
    filler.unlink()
    engine.wait_serving(WAIT)
    assert engine.train_step(bare(1)).result(WAIT).step == 1
    engine.close()
    assert rig.fatal == []


def test_a_start_that_waits_for_room_can_be_stopped(small_disk: Path) -> None:
    small_disk.joinpath("run").mkdir()
    rig = Rig(small_disk / "run")
    sections: dict[str, Any] = {"checkpoints": LONG, "serve": {"reserve_bytes": 0}}
    rig.start(**sections).close()
    shutil.rmtree(small_disk / "run" / "checkpoints")
    fill(small_disk)
    engine = make_engine(rig.folder, rig.config(**sections), on_fatal=rig.fatal.append)
    wait_for(lambda: engine.status().waiting_for == "space on the disk")
    engine.close()


class OverQuota:
    """A connection whose commits fail as a used-up quota lets SQLite's fail."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.used_up = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def execute(self, statement: str, *values: Any) -> Any:
        if self.used_up and statement in (
            "COMMIT",
            "PRAGMA wal_checkpoint(RESTART)",
            "PRAGMA wal_checkpoint(TRUNCATE)",
        ):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
            raise error
        return self._database.execute(statement, *values)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_used_up_quota_holds_training_and_ends_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(0)).result(WAIT)
    journal: Any = engine._start._journal
    over = OverQuota(journal._db)

    def refused(*_: object) -> int:
        if over.used_up:
            raise OSError(number, os.strerror(number))
        return 1

    monkeypatch.setattr(disk.os, "pwrite", refused)
    journal._db = over
    held = engine.train_step(bare(1, "held"))
    wait_for(lambda: engine.status().state is RunState.HELD)
    assert not held.done()
    assert reason(engine.train_step(bare(2))) == "HELD"
    over.used_up = False
    assert held.result(WAIT).step == 2
    assert engine.train_step(bare(2)).result(WAIT).step == 3
    assert rig.fatal == []


def test_a_write_that_fails_though_there_is_room_ends_the_process(rig: Rig) -> None:
    engine = rig.start(checkpoints=LONG)
    journal: Any = engine._start._journal
    journal._db = OverQuota(journal._db)
    assert reason(engine.train_step(bare(1))) == "DRAINING"
    assert [type(error) for error in rig.fatal] == [sqlite3.OperationalError]


def test_a_checkpoint_over_the_quota_fails_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start(checkpoints=LONG)
    engine.train_step(bare(0)).result(WAIT)
    whole = files.flush

    def over(_: Path) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(files, "flush", over)
    failed = engine.save(SaveRequest("one"))
    assert reason(failed) == "CHECKPOINT_FAILED"
    assert "free some space" in str(failed.exception())
    assert engine.train_step(bare(1)).result(WAIT).step == 2
    monkeypatch.setattr(files, "flush", whole)
    assert engine.save(SaveRequest("one")).result(WAIT).step == 2


def test_the_probe_of_a_quota_leaves_no_file(tmp_path: Path) -> None:
    assert disk.can_write(tmp_path, 3 * 2**20 + 5)
    assert list(tmp_path.iterdir()) == []


WORKLOAD = """
import json
import sys
from pathlib import Path
from rig import Rig, bare, WAIT
rig = Rig(Path(sys.argv[1]))
engine = rig.start(checkpoints={"every_seconds": 1e9}, serve={"reserve_bytes": 0})
held = set()
engine.on_state(lambda state: held.add(state.name))
answers = [engine.train_step(bare(step, f"r{step}")).result(60) for step in range(40)]
print(json.dumps({
    "step": answers[-1].step, "digest": answers[-1].digest.hex(), "states": sorted(held),
    "fatal": len(rig.fatal), "state": engine.status().state.name,
}))
engine.close()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="injects EDQUOT with strace, which is not here")
def test_writes_over_a_quota_injected_into_the_system_calls_lose_nothing(tmp_path: Path) -> None:
    command = [
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64",
        "-e", "inject=pwrite64:error=EDQUOT:when=150..155", sys.executable, "-c", WORKLOAD,
    ]  # fmt: skip
    done = subprocess.run(
        [*command, str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["step"], found["fatal"], found["state"]) == (40, 0, "SERVING")
    assert "HELD" in found["states"]
    rig = Rig(tmp_path / "run")
    engine = rig.start()
    assert engine.status().digest.hex() == found["digest"]
    engine.close()


def test_a_batch_that_fits_nowhere_is_still_refused_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.start()
    monkeypatch.setattr(Reserve, "left", lambda _, waiting: 2**13 - waiting)
    engine.train_step(StepRequest(payload(1))).result(WAIT)  # the log is merged at each step
    assert reason(engine.train_step(large(1))) == "HELD"
    assert engine.status().state is RunState.SERVING
