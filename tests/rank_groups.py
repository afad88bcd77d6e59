"""Starts groups of ranks as real processes that talk over gloo."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fork_server
import psutil

WORKER = Path(__file__).parent / "ranks" / "parity_worker.py"
SITE = Path(__file__).parent / "ranks" / "site"
SECONDS = 240.0


def compare(folder: Path, size: int, steps: int, scenarios: dict[str, Any]) -> dict[str, Any]:
    """What each scenario found on a group of this size; fails with what a rank that failed said last."""
    given, out = folder / "scenarios.json", folder / "out.json"
    given.write_text(json.dumps({"steps": steps, "scenarios": scenarios}))
    if fork_server.Process is fork_server.Forked:
        fork_server.CONNECTION.preload("pytest", "maskwire_server.training.sharding", environment={})
    processes = []
    for rank in range(size):
        words = [str(WORKER), str(rank), str(size), str(folder / "store"), str(given), str(out)]
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(fork_server.Process([sys.executable, *words], stdout=log, stderr=log))
    try:
        codes = [process.wait(SECONDS + 30 * steps) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = {rank: (folder / f"rank{rank}.log").read_text()[-1500:] for rank, code in enumerate(codes) if code}
    assert not said, "\n".join(said.values())
    found: dict[str, Any] = json.loads(out.read_text())
    return found


class RankServer:
    """`maskwire-server serve --ranks N` as a user starts it, found by a Unix socket that restarts keep."""

    def __init__(self, folder: Path, ranks: int | None, *settings: str, fault: str = "", patch: str = "",
                 prefix: Sequence[str] = (), flags: Sequence[str] = ()) -> None:  # fmt: skip
        """Without `ranks`: one process, forked. `fault` is RANK:NAME:COUNT:KIND, see `ranks/site`.

        `patch` is a function of `ranks/site/rank_patches.py` that each rank calls first.
        """
        self.folder, self.run_dir, self.log = folder, folder / "run", folder / "log"
        socket = folder / "s"
        self.target = f"unix:{socket}"
        words = [
            f"--run-dir={self.run_dir}", "--address=127.0.0.1:0", f"--set=serve.socket={socket}",
            "--set=serve.threads=1", "--set=model.max_seq_len=64",
        ]  # fmt: skip
        if "model.source=python" not in settings:
            settings = ("model.dim=32", "model.depth=2", "model.heads=2", *settings)
        words += [f"--set={setting}" for setting in settings]
        if ranks is not None:
            words.append(f"--ranks={ranks}")
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **fork_server.ONE_THREAD}
        self.fired = folder / "fired"
        if fault:
            environment["MASKWIRE_TEST_FAULT"] = f"{fault}:{self.fired}"
        if patch:
            environment["MASKWIRE_TEST_PATCH"] = patch
        if fault or patch:
            environment["PYTHONPATH"] = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
        with self.log.open("w") as log:
            process = fork_server.Process if ranks is None else subprocess.Popen
            self.process = process(
                [*prefix, sys.executable, "-m", "maskwire_server", "serve", *words, *flags],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks by number."""
        found: dict[int, psutil.Process] = {}
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                if "maskwire_server" in child.cmdline() and "RANK" in child.environ():
                    found[int(child.environ()["RANK"])] = child
        return found

    def restarts(self) -> int:
        """How often torch's launcher has restarted the ranks that run now."""
        return int(self.ranks()[0].environ()["TORCHELASTIC_RESTART_COUNT"])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """End everything that is left of it."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()
