"""The demo's own `maskwire-server` process, on a free port of this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

READY = "maskwire-server listening on "
START_SECONDS = 120.0


class ServerProcess:
    """Started, killed and started again on the same folder and port."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._log_path = folder / "server.log"
        self._command = [
            str(Path(sys.executable).with_name("maskwire-server")),
            "serve",
            f"--config={config}",
            f"--run-dir={folder / 'run'}",
        ]
        self._process: subprocess.Popen[str] | None = None
        self.address = "127.0.0.1:0"

    def start(self) -> float:
        """Start it, wait until it serves, and return how long that took in seconds."""
        began = time.monotonic()
        with self._log_path.open("a") as log:
            self._process = subprocess.Popen(
                [*self._command, f"--address={self.address}"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only the demo, which then stops it
            )
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else ""
        if not line.startswith(READY):
            raise RuntimeError(
                f"the server did not start; the end of {self._log_path}:\n"
                + "\n".join(self._log_path.read_text().splitlines()[-15:])
            )
        self.address = line.removeprefix(READY).strip()
        return time.monotonic() - began

    def kill(self) -> None:
        """kill -9: no warning, no chance to save."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int | None:
        """SIGTERM: finish the step, save, exit. Returns the exit code; kills it if it takes too long."""
        if self._process is None or self._process.poll() is not None:
            return None if self._process is None else self._process.returncode
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(40)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
