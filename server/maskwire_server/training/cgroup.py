"""The memory and CPU limits of a container, from Linux control groups of versions 1 and 2.

A group's limit also applies to all groups below it, so the smallest limit of a process's group and the groups
above it counts. All files are read below `root`, by default the root of the file system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def free_memory(root: Path = _ROOT) -> int | None:
    """The bytes that this process can still allocate, or None if the system does not say.

    This is the smallest of the machine's MemAvailable and, for each control group, its limit minus the memory
    in use that cannot be reclaimed. MemFree would not count the page cache, although it can be reclaimed.
    """
    machine = _fields(root / "proc/meminfo").get("MemAvailable:")
    found = [] if machine is None else [1024 * machine]
    for group in _groups(root, "memory"):
        limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        state = _fields(group / "memory.stat")
        # Version 1 reports the smallest limit of all groups above, even of those that a container cannot see.
        limits.append(state.get("hierarchical_memory_limit"))
        cache = state.get("total_inactive_file", state.get("inactive_file", 0))
        found += [max(0, limit - max(0, used - cache)) for limit in limits if limit is not None]
    return min(found, default=None)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The number of CPUs, possibly a fraction, whose time this process may use. None without a limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            quota, period = (*_words(group / "cpu.max"), None, None)[:2]
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def allowed_cores(cores: int, root: Path = _ROOT) -> int:
    """The smaller of `cores` and the process's CPU quota, which is rounded up; at least 1."""
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups with `controller` (memory or cpu), innermost first."""
    # Lines are HIERARCHY:CONTROLLERS:PATH. Version 2 has only hierarchy 0, without controllers.
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, own = (*line.split(":", 2), "", "")[:3]
        paths |= dict.fromkeys(controllers.split(","), own)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, kind = before.split(" "), after.split(" ")
        if len(mounted) < 5 or len(kind) < 3:
            continue
        version_2 = kind[0] == "cgroup2"
        if not version_2 and (kind[0] != "cgroup" or controller not in kind[2].split(",")):
            continue
        path = paths.get("" if version_2 else controller)
        if path is None:
            continue
        top = root / _unescaped(mounted[4]).lstrip("/")
        within, part = PurePosixPath(path), _unescaped(mounted[3])
        # A container sees its own group as the root of the mount, but its path may lie outside the mount.
        below = within.relative_to(part) if within.is_relative_to(part) else PurePosixPath()
        if ".." in below.parts:
            below = PurePosixPath()
        for group in (below, *below.parents):
            yield top / group


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    return [line for line in text.split("\n") if line]  # names may contain any other character


def _words(path: Path) -> list[int | None]:
    """The numbers in the first line of a file, with None for each other word, such as `max`."""
    return [_integer(word) for word in next(iter(_lines(path)), "").split()]


def _number(path: Path) -> int | None:
    return next(iter(_words(path)), None)


def _fields(path: Path) -> dict[str, int]:
    """The numbers in a file, by name, from lines of the form NAME NUMBER."""
    fields = (line.split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in fields if len(words) > 1 and words[1].isdigit()}


def _integer(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None
