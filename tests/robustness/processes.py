"""Server processes around the counter trainer, forked from one that has everything imported.

A start takes a tenth of a second instead of one, so that thousands of kills fit into a campaign. They are
processes of their own in every other way: their own memory, threads, files, socket and signals.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
READY = "maskwire-server listening on "
_CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["robustness.processes", "maskwire_server.app", "counter"]
_CONTEXT.set_forkserver_preload(PRELOADED)
os.environ["PYTHONPATH"] = f"{ROOT / 'tests'}:{ROOT}"  # for the process that the others are forked from


def preload(name: str) -> None:
    """Import a module in the process that the servers are forked from, if no server was started yet."""
    _CONTEXT.set_forkserver_preload([*PRELOADED, name])


def _serve(
    folder: str, settings: dict[str, str], fault: str, seconds: float, environment: dict[str, str]
) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    place = Path(folder)
    for number, name in ((1, "ready"), (2, "log")):
        descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    from counter import CounterTrainer
    from faults import Fault

    from maskwire_server import config
    from maskwire_server.app import serve
    from maskwire_server.journal import reserve

    reserve.MERGE_BYTES = 64 * 2**10  # so that the log is merged in a short run too

    class Served(CounterTrainer):
        def train_step(self, *arguments: object) -> object:  # type: ignore[override]
            if seconds:
                time.sleep(seconds)
            self.trained.clear()  # no campaign reads these lists, which would grow with every step
            self.prepared.clear()
            return super().train_step(*arguments)  # type: ignore[arg-type]

    if fault:
        Fault.parse(fault).install(place / "fired")
    sections: dict[str, dict[str, str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    os._exit(serve(config.load(None, **sections), factory=lambda _: Served()))


class Server:
    """A server on a Unix socket of its own, or on `address`; `with` ends it."""

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "",
        seconds: float = 0.0,
        environment: dict[str, str] | None = None,
        **settings: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = address or f"unix:{folder / 'socket'}"
        self._seconds = seconds
        self._environment = environment or {}
        self._settings = {
            "model.num_tokens": "257", "model.mask_id": "256", "model.max_seq_len": "64",
            "run.dir": str(folder / "run"), "serve.address": self.address,
            **{name.replace("__", "."): value for name, value in settings.items()},
        }  # fmt: skip
        self.process: multiprocessing.process.BaseProcess | None = None
        self.starts = 0
        self._lock = threading.Lock()

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def spawn(self, fault: str = "") -> None:
        """Start it, without waiting."""
        (self.folder / "ready").write_text("")
        self.starts += 1
        process = _CONTEXT.Process(
            target=_serve,
            args=(str(self.folder), self._settings, fault, self._seconds, self._environment),
            daemon=True,
        )
        process.start()
        self.process = process  # only now: other threads kill what they find here

    def start(self, fault: str = "") -> bool:
        """Start it; False when it ended before it served."""
        with self._lock:
            self.spawn(fault)
            return self.ready()

    def ready(self, seconds: float = 60) -> bool:
        """Wait until it serves; False when it ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if READY in (self.folder / "ready").read_text():
                return True
            if not self.alive:
                return False
            time.sleep(0.005)
        raise TimeoutError(f"no server after {seconds} s: {self.tail()}")

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        assert self.process is not None
        if self.process.pid is not None and self.process.is_alive():
            with suppress(ProcessLookupError):  # it ended by itself, and the fork server has not told yet
                os.kill(self.process.pid, number)

    def terminate(self, seconds: float = 30) -> int | None:
        """SIGTERM; its exit code, None when it did not end in time."""
        assert self.process is not None
        self.signal(signal.SIGTERM)
        self.process.join(seconds)
        return self.process.exitcode

    def tail(self) -> str:
        """The end of its log."""
        log = self.folder / "log"
        return log.read_text()[-3000:] if log.exists() else ""

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive:
            self.kill()


class Keeper(threading.Thread):
    """Starts a server again whenever it has ended, without a fault, until it is released."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._released = threading.Event()
        self.restarts = 0
        self.paused = False

    def run(self) -> None:
        while not self._released.wait(0.005):
            if not self.paused and not self._server.alive:
                self.restarts += 1
                self._server.start()

    def release(self) -> None:
        self._released.set()
        self.join()
