"""What a run directory may lie on, and the note that a batch leaves when the process dies of it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from maskwire_server.engine import quarantine
from maskwire_server.engine.committer import Reserve
from maskwire_server.engine.quarantine import Quarantine
from maskwire_server.errors import DeviceLost, RunDirectoryError, StateLost
from maskwire_server.journal import database, disk
from maskwire_server.journal.journal import Journal

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/data rw shared:2 - nfs4 server:/data rw
31 30 0:41 / /mnt/data/local rw - xfs /dev/sdb rw
32 22 0:42 / /mnt/with\\040space rw - cifs //server/share rw
33 22 0:43 / /home/me/box rw - fuse.sshfs me@box: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/run-1", None),
        ("/mnt/data/run", "nfs4"),
        ("/mnt/data", "nfs4"),
        ("/mnt/data/local/run", None),
        ("/mnt/database/run", None),
        ("/mnt/with space/run", "cifs"),
        ("/home/me/box/a/b", "fuse.sshfs"),
    ],
)
def test_a_network_file_system_is_known_by_its_mount(path: str, kind: str | None) -> None:
    assert disk.network_file_system(Path(path), MOUNTS) == kind


def test_without_a_list_of_mounts_a_disk_counts_as_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=FileNotFoundError))
    assert disk.network_file_system(Path("/var/run-1")) is None


def test_a_run_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "network_file_system", lambda _: "nfs4")
    with pytest.raises(RunDirectoryError, match=r"network file system \(nfs4\)"):
        Journal(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_reserve_counts_what_is_about_to_be_written(tmp_path: Path) -> None:
    free = disk.free_bytes(tmp_path)
    assert Reserve(tmp_path, 0).left(0) >= 0
    assert Reserve(tmp_path, 0).left(free * 2) < 0
    assert Reserve(tmp_path, free * 2).left(0) < 0


def test_a_batch_that_kills_the_process_is_set_aside_after_so_many_deaths(tmp_path: Path) -> None:
    bad, good = b"b" * 32, b"g" * 32
    open_ended = []
    for deaths in range(3):
        poison = Quarantine(tmp_path, 2)
        assert poison.holds(bad) is (deaths >= 2)
        assert not poison.holds(good)
        with poison.watch(good):
            pass
        if deaths < 2:
            deadly = poison.watch(bad)
            deadly.__enter__()
            open_ended.append(deadly)  # the process dies in it
    with pytest.raises(ValueError, match="no death"), poison.watch(bad):
        raise ValueError("no death")
    assert not Quarantine(tmp_path, 2).holds(bad), "it ended by itself, so it is not counted on"


def test_a_death_that_the_batch_did_not_cause_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(StateLost), Quarantine(tmp_path, 1).watch(b"b" * 32):
        raise StateLost("rank 1 was silent")
    quarantine.forget(tmp_path)
    assert not Quarantine(tmp_path, 1).holds(b"b" * 32)
    quarantine.forget(tmp_path)


@pytest.mark.parametrize("error", [DeviceLost, StateLost])
def test_an_error_that_ends_the_process_counts_as_a_death(tmp_path: Path, error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error), Quarantine(tmp_path, 2).watch(b"b" * 32):
            raise error("such as of one rank")
    assert Quarantine(tmp_path, 2).holds(b"b" * 32)
