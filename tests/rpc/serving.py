"""A real `maskwire-server` process on a free port, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

READY = "maskwire-server listening on "
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


class ServerProcess:
    """Start it, stop it, kill it, start it again on the same run directory."""

    def __init__(self, folder: Path, command: list[str] | None = None, **settings: str) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        flags = {
            **TINY,
            "run.dir": str(folder / "run"),
            **{k.replace("__", "."): v for k, v in settings.items()},
        }
        base = command or [str(Path(sys.executable).with_name("maskwire-server")), "serve"]
        self._command = [*base, *(f"--set={key}={value}" for key, value in flags.items())]
        self.process: subprocess.Popen[str]
        self.address = ""

    def start(self) -> ServerProcess:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), self.log.read_text()
        self.address = line.removeprefix(READY).strip()
        return self

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
