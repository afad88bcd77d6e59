"""The disk under a run directory: whether it can be relied on, and how much room it has."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write says when the disk, or the quota of whoever writes, has no room left."""
_PIECE = 2**20

NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
    "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that holds `path`; None on a disk of this machine.

    Locks and flushes over a network are not what SQLite relies on. `mounts` is the text of
    /proc/self/mountinfo; where there is none, nothing is known, and nothing said.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return None
    place, found = path.absolute(), (0, "")
    for line in mounts.splitlines():
        fields, _, tail = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= found[0]:
            found = len(point.parts), tail.split()[0]
    return found[1] if found[1] in NETWORK else None


def free_bytes(path: Path) -> int:
    """What this process may still write to the disk of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def has_room(folder: Path, size: int) -> bool:
    """Whether `size` bytes can be written there now: they are written, to a file that nobody sees.

    A quota shows in no figure of the file system. False only when the write says that room is missing.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for at in range(0, size, _PIECE):
                os.pwrite(file.fileno(), os.urandom(min(_PIECE, size - at)), at)
    except OSError as error:
        return error.errno not in FULL
    return True
