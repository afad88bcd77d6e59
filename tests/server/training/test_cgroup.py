"""The limits of a container are read from control groups: synthetic trees, and real groups if possible."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskwire_server.training import cgroup as container

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


def tree(
    root: Path, cgroup: str, mounts: list[str], files: dict[str, object], available: int = 64 * GIB
) -> Path:
    """A machine's files. `mounts` are MOUNT_ROOT MOUNT_POINT KIND OPTIONS."""
    lines = []
    for number, mount in enumerate(mounts, 30):
        part, point, kind, options = mount.split()
        lines.append(f"{number} 24 0:{number} {part} {point} rw,nosuid shared:9 - {kind} {kind} {options}\n")
    everything: dict[str, object] = {
        # The page cache is not free, and gives way.
        "proc/meminfo": f"MemTotal: {available // 512} kB\nMemFree: 1024 kB\n"
        f"MemAvailable: {available // 1024} kB",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "24 1 0:1 / / rw - ext4 /dev/vda rw\n" + "".join(lines),
        **files,
    }
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V2 = ["/ /sys/fs/cgroup cgroup2 rw"]
V1 = [
    "/ /sys/fs/cgroup/memory cgroup rw,memory",
    "/ /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct",
    "/ /sys/fs/cgroup/cpuset cgroup rw,cpuset",
]
V1_PATHS = "4:cpuset:/\n3:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n0::/"
FS = "sys/fs/cgroup"


def test_without_groups_the_limits_are_those_of_the_machine(tmp_path: Path) -> None:
    tree(tmp_path, "0::/", [], {})
    assert container.free_memory(tmp_path) == 64 * GIB, "MemAvailable, not MemFree"
    assert container.allowed_cores(8, tmp_path) == 8
    assert container.free_memory(tmp_path / "nothing") is None
    assert container.cpu_quota(tmp_path / "nothing") is None


@pytest.mark.parametrize(("limited", "expected"), [("a/b", 3), ("a", 3), ("", 3)])
def test_v2_uses_the_smallest_limit_up_the_hierarchy(tmp_path: Path, limited: str, expected: int) -> None:
    files: dict[str, object] = {}
    for group in ("a/b", "a"):
        files[f"{FS}/{group}/memory.max"] = "max"
        files[f"{FS}/{group}/cpu.max"] = "max 100000"
    files |= {f"{FS}/{limited}/memory.max": 4 * GIB, f"{FS}/{limited}/memory.current": 2 * GIB}
    files |= {f"{FS}/{limited}/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 5"}
    files |= {f"{FS}/{limited}/cpu.max": "250000 100000"}
    tree(tmp_path, "0::/a/b", V2, files)
    assert container.free_memory(tmp_path) == expected * GIB, "what is cached gives way"
    assert container.cpu_quota(tmp_path) == 2.5
    assert [container.allowed_cores(n, tmp_path) for n in (1, 2, 3, 64)] == [1, 2, 3, 3]


def test_v2_uses_the_smaller_limit_of_two_nested_groups(tmp_path: Path) -> None:
    tree(tmp_path, "0::/pod/app", V2, {
        f"{FS}/pod/memory.max": 8 * GIB, f"{FS}/pod/memory.current": 7 * GIB,
        f"{FS}/pod/app/memory.max": 4 * GIB, f"{FS}/pod/app/memory.current": GIB,
        f"{FS}/pod/cpu.max": "400000 100000", f"{FS}/pod/app/cpu.max": "50000 100000",
    })  # fmt: skip
    assert container.free_memory(tmp_path) == GIB, "the pod's neighbours have taken the rest"
    assert container.allowed_cores(8, tmp_path) == 1


def test_v2_respects_memory_high_and_the_free_memory_of_the_machine(tmp_path: Path) -> None:
    files: dict[str, object] = {f"{FS}/memory.max": "max", f"{FS}/memory.high": 2 * GIB}
    assert container.free_memory(tree(tmp_path / "high", "0::/", V2, files)) == 2 * GIB
    assert container.free_memory(tree(tmp_path / "small", "0::/", V2, files, available=GIB)) == GIB


@pytest.mark.parametrize("limited", ["a/b", "a"])
def test_v1_uses_the_smallest_limit_up_the_hierarchy(tmp_path: Path, limited: str) -> None:
    files: dict[str, object] = {}
    for group in ("a/b", "a"):
        files[f"{FS}/memory/{group}/memory.limit_in_bytes"] = UNLIMITED_V1
        files[f"{FS}/cpu,cpuacct/{group}/cpu.cfs_quota_us"] = -1
        files[f"{FS}/cpu,cpuacct/{group}/cpu.cfs_period_us"] = 100000
    files |= {
        f"{FS}/memory/{limited}/memory.limit_in_bytes": 4 * GIB,
        f"{FS}/memory/{limited}/memory.usage_in_bytes": 3 * GIB,
        f"{FS}/memory/{limited}/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
        f"{FS}/cpu,cpuacct/{limited}/cpu.cfs_quota_us": 150000,
    }
    tree(tmp_path, V1_PATHS, V1, files)
    assert container.free_memory(tmp_path) == 3 * GIB
    assert container.allowed_cores(8, tmp_path) == 2


def test_v1_respects_limits_of_groups_that_a_container_cannot_see(tmp_path: Path) -> None:
    # The container's group is mounted as the top, its path is the machine's.
    mounts = [
        "/docker/1 /sys/fs/cgroup/memory cgroup rw,memory",
        "/docker/1 /sys/fs/cgroup/cpu cgroup rw,cpu",
    ]
    tree(tmp_path, "3:memory:/docker/1\n2:cpu:/docker/1", mounts, {
        f"{FS}/memory/memory.limit_in_bytes": UNLIMITED_V1,
        f"{FS}/memory/memory.usage_in_bytes": GIB,
        f"{FS}/memory/memory.stat": f"hierarchical_memory_limit {3 * GIB}",
        f"{FS}/cpu/cpu.cfs_quota_us": 100000, f"{FS}/cpu/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert container.free_memory(tmp_path) == 2 * GIB
    assert container.allowed_cores(8, tmp_path) == 1


@pytest.mark.parametrize("path", ["/", "/../other", "/docker/1", "/elsewhere"])
def test_v2_in_a_namespace_the_root_of_the_mount_is_the_groups_own_folder(tmp_path: Path, path: str) -> None:
    mounts = ["/docker/1 /sys/fs/cgroup cgroup2 rw"] if path != "/" else V2
    tree(tmp_path, f"0::{path}", mounts, {f"{FS}/memory.max": GIB, f"{FS}/cpu.max": "100000 100000"})
    assert container.free_memory(tmp_path) == GIB
    assert container.allowed_cores(8, tmp_path) == 1


def test_mixed_versions_and_a_mount_point_with_a_space_are_read(tmp_path: Path) -> None:
    mounts = ["/ /a\\040b/unified cgroup2 rw", "/ /a\\040b/memory cgroup rw,memory"]
    tree(tmp_path, "3:memory:/x\n0::/y", mounts, {
        "a b/memory/x/memory.limit_in_bytes": GIB, "a b/unified/y/cpu.max": "200000 100000",
    })  # fmt: skip
    assert container.free_memory(tmp_path) == GIB
    assert container.allowed_cores(8, tmp_path) == 2


@pytest.mark.parametrize(
    "text", ["", "max", "max 100000", "garbage 100000", "100000", "100000 0", "-1 100000"]
)
def test_unreadable_files_set_no_limit(tmp_path: Path, text: str) -> None:
    tree(tmp_path, "0::/", V2, {f"{FS}/cpu.max": text, f"{FS}/memory.max": "max", f"{FS}/memory.stat": "odd"})
    assert container.cpu_quota(tmp_path) is None
    assert container.free_memory(tmp_path) == 64 * GIB


# Real groups.


@contextlib.contextmanager
def real_group(controller: str, settings: list[tuple[str, str, str]]) -> Iterator[Path]:
    """A group with limits, of whichever version the machine has; settings are version, file, value."""
    name = f"maskwire-test-{uuid.uuid4().hex[:8]}"
    v1 = Path("/sys/fs/cgroup") / controller
    version, top = ("v1", v1) if v1.is_dir() else ("v2", Path("/sys/fs/cgroup"))
    group = top / name
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        try:
            for which, file, value in settings:
                if which == version:
                    (group / file).write_text(value)
        except OSError as error:
            pytest.skip(f"limits cannot be set here: {error}")
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def inside(procs: Path, code: str) -> str:
    """What a Python process prints that is in the group from its start."""
    shell = 'echo $$ > "$0" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, str(procs), sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_cpu_quota_of_a_real_group_is_found() -> None:
    half = [
        ("v1", "cpu.cfs_period_us", "100000"),
        ("v1", "cpu.cfs_quota_us", "100000"),
        ("v2", "cpu.max", "100000 100000"),
    ]
    with real_group("cpu", half) as procs:
        code = "from maskwire_server.training import cgroup; print(cgroup.allowed_cores(64))"
        assert inside(procs, code) == "1"


def test_check_reports_the_memory_limit_of_a_real_group() -> None:
    limit = [("v1", "memory.limit_in_bytes", str(GIB)), ("v2", "memory.max", str(GIB))]
    with real_group("memory", limit) as procs:
        code = "from maskwire_server.training import cgroup; print(cgroup.free_memory())"
        assert 0 < int(inside(procs, code)) <= GIB


def test_the_trainer_and_check_use_the_limits_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskwire_server import config
    from maskwire_server.training import numerics
    from maskwire_server.training.footprint import footprint

    monkeypatch.setattr(container, "cpu_quota", lambda *_: 1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert numerics.cores() == 1
    whole = config.load(None, serve={"device": "cpu"})
    for free, fits in ((2**26, False), (2**40, True)):
        monkeypatch.setattr(container, "free_memory", lambda free=free: free)
        report = footprint(whole.model, whole.objective, whole.optimizer, whole.serve)
        assert report.fits == fits
        assert any(line.startswith("together") and " available on cpu" in line for line in report.lines)
