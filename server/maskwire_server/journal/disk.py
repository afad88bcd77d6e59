"""The disk under a run directory: whether it can be relied on, and how much room it has."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write says when the disk, or the quota of whoever writes, has no room left."""
_PIECE = 2**20

NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
    "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip

_ESCAPED = re.compile(r"\\([0-7]{3})")  # a space, tab, newline or backslash of a path

_OF_VOLUMES = {
    "lost+found", ".Trash", "$RECYCLE.BIN", "System Volume Information", ".DS_Store", ".Trashes",
    ".fseventsd", ".Spotlight-V100", ".TemporaryItems", ".DocumentRevisions-V100", ".apdisk", ".directory",
    "desktop.ini", "Thumbs.db", "aquota.user", "aquota.group",
}  # fmt: skip


def of_volume(name: str) -> bool:
    """Whether file systems and desktops put such a name into a volume's root by themselves."""
    return name in _OF_VOLUMES or name.startswith((".Trash-", "._"))


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that holds `path`; None on a disk of this machine.

    Locks and flushes over a network are not what SQLite relies on. `mounts` is the text of
    /proc/self/mountinfo; where there is none, nothing is known, and nothing said.
    """
    if mounts is None:
        try:
            mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        except OSError:
            return None
    place, found = path.absolute(), (0, "")
    for line in filter(None, mounts.split("\n")):  # paths hold any other character
        fields, _, tail = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4]))
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
