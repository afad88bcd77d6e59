"""Implements `maskwire-server serve --ranks N`: runs torch's elastic launcher as a child process.

The launcher restarts all ranks when one ends with an error. A configuration error must not be retried, and
SIGTERM must reach only the leader, which drains and then ends its followers: the launcher would end all ranks
at once. Therefore, a rank that must not be restarted exits with 0, the leader writes the exit code of `serve`
to a file, and this process forwards signals to the leader. On a host without the leader, it waits until
the leader has ended. This process does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from maskwire_server.errors import ConfigError
from maskwire_server.ranks import addresses

if TYPE_CHECKING:
    from maskwire_server.config import DistributedConfig  # needs the extra `server`

log = logging.getLogger(__name__)

FOLDER = "MASKWIRE_LAUNCH_DIR"
"""Variable with the folder for the leader's process id and, when it ends for good, its exit code."""
LEADER = "MASKWIRE_LEADER"
"""Variable that is 1 on the host that has the run directory, if there are several hosts."""
_PREFIX = "maskwire-launch-"
_AGENT = "torch-launcher.pid"
_PID, _EXIT_CODE, _LOSS, _STOPPING = "leader.pid", "exit-code", "loss", "stopping"
_CLEARED = "batch-cleared"
_RESTARTS = 1000
_FAILURE = 70
_JOIN_SECONDS = 365 * 24 * 3600
"""How long the group waits for a host that is missing. By default torch gives up after ten minutes."""
_EXIT_SECONDS = 5.0
"""How long torch's launcher may take to end once the leader has ended for good. It waits up to 300 s for the
launchers of the other hosts, which may be gone."""
_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0
"""How long a stop may take on a host without the leader, besides `Launch.drain_seconds`."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """How many ranks to start, and where."""

    ranks: int
    """The number of ranks on this host."""
    nodes: int = 1
    rendezvous: str | None = None
    """HOST:PORT of the host that has the run directory, if there are several hosts."""
    drain_seconds: float = 30.0
    """How long the leader may take to stop."""
    follows_files: bool = False
    """Whether the leader reads certificates and tokens again on SIGHUP."""


def launch(chosen: Launch, arguments: Sequence[str]) -> int:
    """Run `maskwire-server ARGUMENTS` on every rank until the leader ends for good. Returns its exit code.

    Raises ConfigError if the rendezvous cannot be used.
    """
    with _folder() as folder:
        environment = {
            **os.environ,
            FOLDER: folder,
            # With one store for all restarts, most restarts fail: "Connection refused" (pytorch #135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # each rank sets its own number
        }
        if chosen.nodes == 1:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no rank listens on the network
        else:
            host, port = _rendezvous(chosen)
            interface = addresses.interface(addresses.towards(host))
            addresses.check_name(host)
            leads = addresses.is_here(host)
            environment |= {LEADER: str(int(leads))}
            if leads:
                addresses.check_port(host, port)
            else:
                addresses.wait_for(host, port)
            if interface is not None:  # gloo's default, that of the host's name, may be lo
                environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        command = [sys.executable, "-m", "maskwire_server.ranks.torch_launcher", *_options(chosen, folder)]
        launcher = subprocess.Popen(
            [*command, "-m", "maskwire_server", *arguments],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process
            preexec_fn=partial(_end_with, os.getpid(), signal.SIGTERM),  # noqa: PLW1509 - there are no threads here
        )
        (Path(folder) / _AGENT).write_text(str(launcher.pid))
        follows = environment.get(LEADER) == "0"
        _forward_signals(Path(folder), launcher, follows=follows)
        if chosen.follows_files:
            _forward_hang_up(Path(folder))
        limits = {_EXIT_CODE: _EXIT_SECONDS}
        if follows:
            limits[_STOPPING] = chosen.drain_seconds + _STOP_SECONDS
        code = _wait(launcher, Path(folder), limits)
        noted: int | None = None
        with contextlib.suppress(OSError, ValueError):
            noted = int((Path(folder) / _EXIT_CODE).read_text())
        if code and not (Path(folder) / _STOPPING).exists():
            log.error("torch's launcher ended with exit code %d; start the server again to resume", code)
            return noted or _FAILURE  # the launcher may have stopped the leader, which then noted 0
        if noted is not None:
            return noted
        return code if code >= 0 else _FAILURE  # 0: the leader is on another host, and ended for good


def check_layout(distributed: DistributedConfig, size: int) -> None:
    """Raise ConfigError if `size` ranks do not form the configured layout."""
    shard = distributed.shard or size // distributed.replicate
    if shard * distributed.replicate != size:
        raise ConfigError(
            f"distributed: replicate x shard must be the number of ranks, {size}, got "
            f"{distributed.replicate} x {distributed.shard or 'off'}"
        )


def note_leader() -> None:
    """Tell the launcher, if there is one, that this process is the leader."""
    _write(_PID, os.getpid())


def note_exit(code: int) -> int:
    """Tell the launcher that `serve` ends for good with `code`. Returns the code with which to exit."""
    return 0 if _write(_EXIT_CODE, code) else code


def note_loss(problem: str, batch_is_suspect: bool = True) -> None:
    """Record for the next leader on this host why the ranks restart, and whether a batch may be the cause."""
    _write(_LOSS, problem)
    if not batch_is_suspect:
        _write(_CLEARED, "")


def batch_was_cleared() -> bool:
    """Whether the ranks restart for a reason that a batch cannot cause. True once per such restart."""
    try:
        (Path(os.environ.get(FOLDER, "/nowhere")) / _CLEARED).unlink()
    except OSError:
        return False
    return True


def is_stopping() -> bool:
    """Whether the launcher was asked to stop. A restarted leader must then exit instead of serving."""
    return (Path(os.environ.get(FOLDER, "/nowhere")) / _STOPPING).exists()


def end_with_launcher() -> None:
    """Have the kernel kill this rank when torch's launcher ends; exit if it has ended already. Linux only."""
    parent = os.getppid()
    folder = os.environ.get(FOLDER)
    if folder is not None:  # the launcher may have ended already, so that this rank has another parent
        try:
            parent = int((Path(folder) / _AGENT).read_text())
        except (OSError, ValueError):
            os._exit(_FAILURE)
    _end_with(parent, signal.SIGKILL)


def last_loss() -> str:
    """Why the ranks last restarted; "" if no reason was recorded."""
    folder = os.environ.get(FOLDER, "")
    with contextlib.suppress(OSError):
        return (Path(folder) / _LOSS).read_text()
    return ""


def _write(name: str, value: object) -> bool:
    folder = os.environ.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        return False
    part = Path(folder) / f"{name}.{os.getpid()}"
    part.write_text(str(value))
    part.replace(Path(folder) / name)
    return True


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for this launch. Deletes the folders that killed launchers left behind."""
    for each in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _delete_if_left(each)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # on a file system without locks, nothing is deleted
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            os.close(lock)


def _delete_if_left(folder: Path) -> None:
    """Delete a launch folder of this user if no running launcher holds its lock."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_own = os.fstat(lock).st_uid == os.getuid()
            if is_own and (folder / _AGENT).exists():  # without it, the launcher will lock the folder
                shutil.rmtree(folder)
        finally:
            os.close(lock)


def _options(chosen: Launch, folder: str) -> list[str]:
    options = [
        f"--nproc-per-node={chosen.ranks}", f"--nnodes={chosen.nodes}", f"--max-restarts={_RESTARTS}",
        "--monitor-interval=0.1", f"--log-dir={folder}",  # by default torch leaves a folder in TMPDIR
    ]  # fmt: skip
    if chosen.nodes == 1:
        # torch's launcher unpickles the values of its store. On one host the store is therefore a file that
        # only this user can write, and not a port that is open to the network.
        rendezvous = Path(folder) / "rendezvous"
        return [
            *options, "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-conf=store_type=file",
            "--rdzv-id=maskwire", "--local-addr=127.0.0.1",
        ]  # fmt: skip
    host, _ = _rendezvous(chosen)
    return [
        *options, "--rdzv-backend=c10d", f"--rdzv-endpoint={chosen.rendezvous}", "--rdzv-id=maskwire",
        f"--rdzv-conf=is_host={str(addresses.is_here(host)).lower()},join_timeout={_JOIN_SECONDS}",
        f"--local-addr={addresses.towards(host)}",
    ]  # fmt: skip


def _rendezvous(chosen: Launch) -> tuple[str, int]:
    host, colon, port = (chosen.rendezvous or "").rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"--rendezvous must be HOST:PORT of the host that has the run directory if --nodes is "
            f"{chosen.nodes}, with a port from 1 to 65535, got {chosen.rendezvous!r}"
        )
    return host, int(port)


def _end_with(parent: int, number: int) -> None:
    """Have the kernel signal this process when its parent ends; exit if it has ended already. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(_FAILURE)


def _wait(launcher: subprocess.Popen[bytes], folder: Path, limits: Mapping[str, float]) -> int:
    """Wait for torch's launcher, and return its exit code; 0 if it had to be killed.

    `limits` maps the name of a file to a time in seconds: the launcher is killed that long after the file
    appears. All ranks on this host end with the launcher.
    """
    seen: dict[str, float] = {}
    while (code := launcher.poll()) is None:
        for name, seconds in limits.items():
            if not (folder / name).exists():
                continue
            if time.monotonic() - seen.setdefault(name, time.monotonic()) > seconds:
                launcher.kill()  # after SIGTERM it would wait 30 s for followers, which ignore that signal
                launcher.wait()
                return 0
        time.sleep(_POLL_SECONDS)
    return code


def _forward_signals(folder: Path, launcher: subprocess.Popen[bytes], *, follows: bool) -> None:
    """Forward SIGTERM and SIGINT to the leader. Without a leader on this host, end torch's launcher.

    If the leader is on another host (`follows`), the first signal only waits for the leader: it may have
    received the signal too, and needs its followers until it has stopped. A second signal does not wait.
    """

    def forward(number: int, _: FrameType | None) -> None:
        is_first = not (folder / _STOPPING).exists()
        (folder / _STOPPING).touch()
        if follows and is_first:
            log.info("%s: waiting until the leader has stopped", signal.Signals(number).name)
            return
        try:
            pid = int((folder / _PID).read_text())
            os.kill(pid, number)
        except (OSError, ValueError):
            note = folder / _EXIT_CODE
            if not note.exists():
                note.write_text("0")
            launcher.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _forward_hang_up(folder: Path) -> None:
    """Forward SIGHUP to the leader if it is on this host and already handles signals."""

    def forward(*_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / _PID).read_text()), signal.SIGHUP)

    signal.signal(signal.SIGHUP, forward)
