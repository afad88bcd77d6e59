"""A real `maskwire-server` process on a free port, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

READY = "maskwire-server listening on "
WAIT = 60.0
COUNTING = [sys.executable, str(Path(__file__).with_name("counting_server.py"))]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
TINY = {
    "model.num_tokens": "17",
    "model.mask_id": "16",
    "model.max_seq_len": "32",
    "model.dim": "32",
    "model.depth": "1",
    "model.heads": "2",
    "model.dim_head": "16",
    "serve.threads": "1",
    "serve.address": "127.0.0.1:0",
}


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait for a condition, however slow the machine is; AssertionError after a minute."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT:.0f} s in vain for {what}"
        time.sleep(0.005)


class ServerProcess:
    """Start it, stop it, kill it, start it again on the same run directory."""

    def __init__(self, folder: Path, command: list[str] | None = None, **settings: str) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        self.gate = folder / "hold"
        """While this file exists, a counting server waits at the beginning of each step."""
        tiny = {
            k: v for k, v in TINY.items() if "model__source" not in settings or not k.startswith("model.")
        }
        flags = {
            **tiny,
            "run.dir": str(folder / "run"),
            **{k.replace("__", "."): v for k, v in settings.items()},
        }
        base = command or [str(Path(sys.executable).with_name("maskwire-server")), "serve"]
        self._command = [*base, *(f"--set={key}={value}" for key, value in flags.items())]
        self.environment = dict(fork_server.ONE_THREAD)
        self.forked = True
        """From a process that has everything imported, tests/fork_server.py; False: the command itself."""
        self.process: subprocess.Popen[str]
        self.address = ""

    def start(self) -> ServerProcess:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            start = fork_server.Process if self.forked else subprocess.Popen
            self.process = start(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.environment},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), self.log.read_text()
        self.address = line.removeprefix(READY).strip()
        return self

    def hold(self) -> None:
        """Let a counting server wait at the beginning of each step from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.gate.touch()

    def release(self) -> None:
        """Let the held step and the later ones continue."""
        self.gate.unlink()

    def wait_for_step(self, count: int = 1) -> None:
        """Wait until a counting server has begun so many steps."""
        wait_until(lambda: self.log.read_text().count("a step begins") >= count, f"step {count} to begin")

    def wait_for_arrivals(self, count: int) -> None:
        """Wait until so many steps came to a counting server: whatever is sent from now on comes later."""
        wait_until(lambda: self.log.read_text().count("a step arrives") >= count, f"{count} steps to arrive")

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def healthy(address: str, service: str = "") -> bool:
    """Whether the health service says SERVING of a service."""
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=20
        )
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def health(address: str) -> tuple[bool, bool, bool]:
    """What the health service says: whether the server is ready, under both of its names, and live."""
    return healthy(address), healthy(address, "maskwire.v1.TrainingService"), healthy(address, "liveness")
