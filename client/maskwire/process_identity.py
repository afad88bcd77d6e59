"""Identity of this process, and whether another process on this machine has ended.

On Linux a process is distinguished from a later one with the same id by its start time, from one of an
earlier boot by the boot id, and from one in another container by its namespace of process ids. On other
systems nothing is known, and no process counts as ended.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from maskwire.v1 import training_service_pb2 as pb

_TEXT = 128  # the most characters of a text in a request
_TASK = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")
_RESTARTS = "SLURM_RESTART_COUNT"
"""Slurm's variables: `_TASK` stays the same when the job is requeued, and `_RESTARTS` counts the requeues."""


def this_process() -> pb.ClientProcess:
    """Describe this process, as far as the system allows."""
    return pb.ClientProcess(
        host=_text(socket.gethostname()),
        process_id=os.getpid(),
        start_time_ticks=_start_time("self") or 0,
        boot_id=_read("/proc/sys/kernel/random/boot_id").strip(),
        pid_namespace=_pid_namespace(),
        job=_job(os.environ),
    )


def default_name() -> str:
    """Return a name unique to this process, which stays the same while it runs."""
    process = this_process()
    process.job = ""
    unique = hashlib.sha256(process.SerializeToString(deterministic=True)).hexdigest()[:6]
    return f"{process.host[:64] or 'job'}-{process.process_id}-{unique}"


def is_gone(holder: pb.ClientProcess) -> bool:
    """Whether a process has certainly ended: it ran on this machine and is gone, or it was this Slurm task
    before its job was requeued.

    Slurm requeues a job only after it has ended, on any machine. Other schedulers do not say whether a
    process replaces another one of its job or runs beside it.
    """
    here = this_process()
    same_boot = holder.boot_id and holder.boot_id == here.boot_id and holder.host == here.host
    if same_boot and holder.pid_namespace and holder.pid_namespace == here.pid_namespace:
        return not _lives(holder.process_id, holder.start_time_ticks)
    task, _, restarts = here.job.rpartition(":")
    their_task, _, their_restarts = holder.job.rpartition(":")
    both = restarts.isdecimal() and their_restarts.isdecimal()
    return bool(task) and task == their_task and both and int(restarts) > int(their_restarts)


def holder_of(metadata: Mapping[str, str]) -> pb.ClientProcess:
    """Read the process that holds the session from the metadata of a WRITER_PRESENT error."""

    def number(name: str) -> int:
        value = metadata.get(f"writer_{name}", "")
        return int(value) if value.isdecimal() else 0

    return pb.ClientProcess(
        host=metadata.get("writer_host", ""),
        process_id=number("process_id"),
        start_time_ticks=number("start_time_ticks"),
        boot_id=metadata.get("writer_boot_id", ""),
        pid_namespace=metadata.get("writer_pid_namespace", ""),
        job=metadata.get("writer_job", ""),
    )


def _lives(process_id: int, start_time: int) -> bool:
    """Whether a process may still be running. True if the system does not say."""
    if process_id <= 0 or not start_time:
        return True
    try:
        os.kill(process_id, 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    found = _start_time(str(process_id))
    return found is None or found == start_time


def _start_time(process: str) -> int | None:
    """Start time of a process in clock ticks since boot; 0 if it is a zombie, None if the system does not
    say.
    """
    # The command's name, in parentheses, may contain anything.
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _job(environment: Mapping[str, str]) -> str:
    if not environment.get(_TASK[0]):
        return ""
    task = [environment.get(name, "") for name in _TASK]
    return _text(":".join(["slurm", *task, environment.get(_RESTARTS) or "0"]))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _text(value: str) -> str:
    return "".join(character for character in value if character.isprintable())[:_TEXT]
