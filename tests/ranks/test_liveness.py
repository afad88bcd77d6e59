"""Ranks that end, fall silent, or are no ranks; orders; what the launcher is told."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskwire_server.errors import ConfigError
from maskwire_server.ranks import addresses, launcher
from maskwire_server.ranks.liveness import LOOPBACK, Monitor, how_it_ended, watch_leader
from maskwire_server.ranks.orders import Order

LONG = 30.0


class Group:
    """A monitor of one follower, and what it said."""

    def __init__(self, timeout: float, followers: int = 1) -> None:
        self.lost: queue.Queue[tuple[str, bool]] = queue.Queue()
        self.monitor = Monitor(LOOPBACK, followers, timeout, lambda *loss: self.lost.put(loss))

    def connect(self, greeting: str) -> socket.socket:
        link = socket.create_connection((LOOPBACK, self.monitor.address.port), LONG)
        link.sendall(greeting.encode())
        return link

    def greeting(self, rank: int, pid: int) -> str:
        return f"{self.monitor.address.token} {rank} {pid}\n"


def test_a_follower_that_ends_is_noticed_at_once() -> None:
    group = Group(LONG)
    link = group.connect(group.greeting(1, os.getpid()))
    link.close()
    assert group.lost.get(timeout=10) == ("rank 1 ended", True)


JOINS = (
    "import os, socket, sys; link = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); "
    "link.sendall(f'{sys.argv[2]} 1 {os.getpid()}\\n'.encode()); {end}"
)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by signal 9 (Killed), perhaps for lack of memory; "
         "check dmesg"),
        ("os.kill(os.getpid(), 11)", "was killed by signal 11 (Segmentation fault)"),
        ("os.kill(os.getpid(), 35)", "was killed by signal 35 (Real-time signal 1)"),
        ("os._exit(70)", "ended with exit code 70"),
        ("os._exit(0)", "ended"),
    ],
)  # fmt: skip
def test_a_loss_says_how_the_follower_ended(end: str, expected: str) -> None:
    group = Group(LONG)
    address = group.monitor.address
    given = [str(address.port), address.token]
    with subprocess.Popen([sys.executable, "-c", JOINS.replace("{end}", end), *given]):
        assert group.lost.get(timeout=LONG) == (f"rank 1 {expected}", True)


def test_a_process_that_is_gone_has_ended() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait(LONG)
    assert how_it_ended(done.pid) == "ended"


def test_a_frozen_follower_of_the_same_host_is_ended() -> None:
    group = Group(0.3)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as frozen:
        with group.connect(group.greeting(3, frozen.pid)):
            assert group.lost.get(timeout=10) == ("rank 3 was silent for 0.3 s", False)
        assert frozen.wait(10) == -9


def test_a_stranger_on_the_port_is_no_rank() -> None:
    group = Group(LONG)
    for words in ("GET / HTTP/1.1\r\n", "\n", f"{'0' * 32} 1 {os.getpid()}\n", "\xff\xfe\n"):
        with group.connect(words) as link:
            link.settimeout(LONG)
            assert link.recv(16) == b"", "it is closed without an answer"
    lost: queue.Queue[tuple[str, bool]] = queue.Queue()
    ended: queue.Queue[str] = queue.Queue()
    watch_leader(group.monitor.address, 1, LONG, lambda *loss: lost.put(loss), lambda: ended.put("end"))
    while not group.monitor._links:
        assert group.lost.empty()
    group.monitor.end_followers()
    assert ended.get(timeout=10) == "end"
    assert lost.empty()


def test_followers_that_never_come_are_missed() -> None:
    assert Group(0.2, followers=2).lost.get(timeout=10) == ("2 of 2 followers did not connect", False)


def test_a_follower_notices_that_the_leader_is_gone() -> None:
    lost: queue.Queue[tuple[str, bool]] = queue.Queue()
    with socket.create_server((LOOPBACK, 0)) as listener:
        address = replace(Group(LONG).monitor.address, port=listener.getsockname()[1])
        watch_leader(address, 1, LONG, lambda *loss: lost.put(loss), lambda: None)
        listener.accept()[0].close()
    assert lost.get(timeout=10) == ("the leader ended", True), "the process of the address is running"


def test_orders_are_json_and_bytes() -> None:
    order = Order("train_step", {"lineage": 1, "step": 2}, b"\x00\xff")
    data = order.encode()
    assert Order.decode(data) == order
    with pytest.raises(ValueError, match=f"an order must have {len(data)} bytes, got {len(data) - 1}"):
        Order.decode(data[:-1])


@pytest.mark.parametrize("rendezvous", [None, "host", "host:", ":1", "host:port", "host:0", "host:65536"])
def test_several_hosts_need_a_rendezvous(rendezvous: str | None) -> None:
    with pytest.raises(ConfigError, match="--rendezvous must be HOST:PORT of the host that has the run"):
        launcher.launch(launcher.Launch(1, 2, rendezvous), [])


def test_a_rendezvous_port_that_is_taken_is_refused() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        message = (
            rf"^--rendezvous: port {port} of {LOOPBACK} cannot be used \(Address already in use\); give "
            r"another port, the same on every host$"
        )
        with pytest.raises(ConfigError, match=message):
            launcher.launch(launcher.Launch(1, 2, f"{LOOPBACK}:{port}"), [])


def test_the_leader_tells_the_launcher_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.note_exit(3) == 3, "without a launcher the code is the process's own"
    monkeypatch.setenv(launcher.FOLDER, str(tmp_path))
    assert launcher.note_exit(3) == 0
    assert (tmp_path / "exit-code").read_text() == "3"
    assert launcher.last_loss() == ""
    launcher.note_loss("rank 1 ended")
    assert launcher.last_loss() == "rank 1 ended"
    assert not launcher.batch_was_cleared()
    launcher.note_loss("rank 1 was silent for 10 s", batch_is_suspect=False)
    assert launcher.last_loss() == "rank 1 was silent for 10 s"
    assert [launcher.batch_was_cleared() for _ in range(2)] == [True, False]


RANK = (
    "from maskwire_server.ranks.launcher import end_with_launcher; end_with_launcher(); "
    "print('serves', flush=True); input()"
)


@pytest.mark.parametrize("noted", ["this process", "another process", "nothing"])
def test_a_rank_serves_only_under_the_launcher_that_started_it(noted: str, tmp_path: Path) -> None:
    """A rank whose launcher was killed has another parent, or its launcher's folder is gone."""
    if noted != "nothing":
        number = os.getpid() + (noted == "another process")
        (tmp_path / "torch-launcher.pid").write_text(str(number))
    done = subprocess.run(
        [sys.executable, "-c", RANK], env={**os.environ, launcher.FOLDER: str(tmp_path)}, input="\n",
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    expected = (0, "serves\n") if noted == "this process" else (70, "")
    assert (done.returncode, done.stdout) == expected, done.stderr


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    """The launcher starts a rank, passes on its process id, and is killed."""
    starts = (
        "import os, subprocess, sys; from pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'torch-launcher.pid').write_text(str(os.getpid()))\n"
        f"subprocess.run([sys.executable, '-c', {RANK!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-uc", starts], env={**os.environ, launcher.FOLDER: str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"serves\n"
        parent.kill()
        assert parent.stdout.read() == b"", "the rank has closed its output too"


@pytest.mark.parametrize("follows", [True, False])
def test_a_stop_ends_the_ranks_at_once_unless_the_leader_is_elsewhere_and_may_need_them(
    follows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: dict[int, Callable[[int, None], None]] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    sent: list[int] = []
    torch_launcher: Any = SimpleNamespace(send_signal=sent.append)
    launcher._forward_signals(tmp_path, torch_launcher, follows=follows)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert (tmp_path / "stopping").exists()
    assert sent == [signal.SIGTERM] * (not follows)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert sent[-1] == signal.SIGTERM, "a second signal does not wait"


@pytest.mark.parametrize(
    ("appears", "expected"), [("exit-code", 0), ("stopping", 0), ("leader.pid", 7), ("", 7)]
)
def test_a_launcher_that_waits_for_another_host_is_ended(appears: str, expected: int, tmp_path: Path) -> None:
    """At the limit of the leader's exit code or of a stop; before it, the launcher's own code counts."""
    if appears:
        (tmp_path / appears).touch()
    with subprocess.Popen(
        [sys.executable, "-c", "input(); raise SystemExit(7)"], stdin=subprocess.PIPE
    ) as torch_launcher:
        if expected:
            assert torch_launcher.stdin is not None
            torch_launcher.stdin.write(b"\n")
            torch_launcher.stdin.flush()
        limits = (
            {"exit-code": 0.2, "stopping": 0.2} if not expected else {"exit-code": LONG, "stopping": LONG}
        )
        assert launcher._wait(torch_launcher, tmp_path, limits) == expected
        assert torch_launcher.returncode == (expected or -9)


def test_a_host_waits_for_the_others_as_long_as_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    """Both for the leader's host, at which torch's launcher cannot ask otherwise, and for the rest."""
    options = launcher._options(launcher.Launch(1, 2, "127.0.0.1:29500"), "folder")
    (given,) = [each for each in options if each.startswith("--rdzv-conf=")]
    settings = dict(each.split("=") for each in given.removeprefix("--rdzv-conf=").split(","))
    assert settings["is_host"] == "true"
    assert int(settings["join_timeout"]) >= 30 * 24 * 3600
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    caplog.set_level("INFO")
    waiting = threading.Thread(target=addresses.wait_for, args=(LOOPBACK, port), daemon=True)
    waiting.start()
    while f"waiting for {LOOPBACK}:{port}" not in caplog.text:
        assert waiting.is_alive()
    with socket.create_server((LOOPBACK, port)):
        waiting.join(60)
        assert not waiting.is_alive()


def test_a_name_that_other_hosts_cannot_use_is_refused() -> None:
    """Debian gives a host's own name a loopback address. One that is given as such is what was meant."""
    message = (
        r"^--rendezvous: localhost must not be a loopback address, got 127\.0\.0\.1; give its address in the "
        r"network of the hosts$"
    )
    with pytest.raises(ConfigError, match=message):
        launcher.launch(launcher.Launch(1, 2, "localhost:29500"), [])
    addresses.check_name("127.0.1.1")


def test_what_a_killed_launcher_left_is_deleted_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = {tmp_path / "maskwire-launch-new", tmp_path / "other"}
    left = tmp_path / "maskwire-launch-left"
    for folder in (*kept, left):
        folder.mkdir()
    for folder in (tmp_path / "other", left):
        (folder / "torch-launcher.pid").touch()
    (tmp_path / "maskwire-launch-link").symlink_to(tmp_path / "other")
    with launcher._folder() as first:
        (Path(first) / "torch-launcher.pid").touch()
        assert not left.exists()
        with launcher._folder() as second:
            assert Path(first).exists(), "its launcher is running"
            assert Path(second) not in {Path(first), *kept}
    assert set(tmp_path.iterdir()) == {*kept, tmp_path / "maskwire-launch-link"}
    assert list((tmp_path / "other").iterdir())
