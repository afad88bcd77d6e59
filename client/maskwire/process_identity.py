"""The identity of this process, and a check whether another process has ended.

A process id alone is ambiguous. On Linux, the start time tells a process from a later one with the same id,
the boot id from one of an earlier boot, and the namespace of process ids from one in another container. Other
systems do not provide these values, and there no process counts as ended.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from maskwire.v1 import training_service_pb2 as pb

_TEXT = 128  # the most characters that a request may have in a text field
_TASK = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")
_RESTARTS = "SLURM_RESTART_COUNT"
"""Slurm's variables: `_TASK` stays the same when the job is requeued, and `_RESTARTS` counts the requeues."""


def this_process() -> pb.ClientProcess:
    """Return the description of this process that a session sends, as far as the system provides it."""
    return pb.ClientProcess(
        host=_text(socket.gethostname()),
        process_id=os.getpid(),
        start_time_ticks=_start_time("self") or 0,
        boot_id=_read("/proc/sys/kernel/random/boot_id").strip(),
        pid_namespace=_pid_namespace(),
        job=_job(os.environ),
    )


def default_name() -> str:
    """Return a name for this process, HOST-ID-HASH, that is unique and stays the same while it runs."""
    process = this_process()
    process.job = ""
    unique = hashlib.sha256(process.SerializeToString(deterministic=True)).hexdigest()[:6]
    return f"{process.host[:64] or 'job'}-{process.process_id}-{unique}"


def is_gone(holder: pb.ClientProcess) -> bool:
    """Whether the process `holder` has certainly ended.

    It has if it ran on this machine and no longer exists, or if it was this same Slurm task before the job
    was requeued: Slurm requeues a job only after the job has ended on all machines. Other schedulers do not
    say whether a process replaces another process of its job or runs beside it.
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
    """Return the process that holds the session, from the metadata of a WRITER_PRESENT error."""

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
    """Whether a process on this machine may still be running. True if the system does not say."""
    if process_id <= 0 or not start_time:
        return True
    try:
        os.kill(process_id, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    found = _start_time(str(process_id))
    return found is None or found == start_time


def _start_time(process: str) -> int | None:
    """Return the start time of a process in clock ticks since boot.

    Returns 0 for a zombie, and None if the system does not say.
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
