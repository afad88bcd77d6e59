"""The disk of a run directory: its type of file system and its free space."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a write when the disk, or a quota on it, is full."""
_PIECE = 2**20

NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
    "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip

_ESCAPED = re.compile(r"\\([0-7]{3})")  # how mountinfo writes a space, tab, newline or backslash in a path

_OF_VOLUMES = {
    "lost+found", ".Trash", "$RECYCLE.BIN", "System Volume Information", ".DS_Store", ".Trashes",
    ".fseventsd", ".Spotlight-V100", ".TemporaryItems", ".DocumentRevisions-V100", ".apdisk", ".directory",
    "desktop.ini", "Thumbs.db", "aquota.user", "aquota.group",
}  # fmt: skip


def of_volume(name: str) -> bool:
    """Whether a file system or desktop creates files of this name in a volume's root."""
    return name in _OF_VOLUMES or name.startswith((".Trash-", "._"))


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that holds `path`; None on a local disk.

    SQLite cannot rely on locks and flushes over a network. `mounts` is the text of /proc/self/mountinfo; on
    a system without that file, the result is None.
    """
    if mounts is None:
        try:
            mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        except OSError:
            return None
    place, found = path.absolute(), (0, "")
    for line in filter(None, mounts.split("\n")):  # paths may contain any other character
        fields, _, tail = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4]))
        if place.is_relative_to(point) and len(point.parts) >= found[0]:
            found = len(point.parts), tail.split()[0]
    return found[1] if found[1] in NETWORK else None


def free_bytes(path: Path) -> int:
    """How many bytes this process can still write to the disk of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def can_write(folder: Path, size: int) -> bool:
    """Whether a folder has space for `size` bytes, which is tested by writing them to an unnamed file.

    The statistics of the file system do not show a quota. The result is False only if the write fails for
    lack of space.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for at in range(0, size, _PIECE):
                os.pwrite(file.fileno(), os.urandom(min(_PIECE, size - at)), at)
    except OSError as error:
        return error.errno not in FULL
    return True
