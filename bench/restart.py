"""P8: from kill -9 to the next applied step, by the phases that the server logs."""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import maskwire
from bench.harness import READY, Row

SERVER = str(Path(sys.executable).with_name("maskwire-server"))
PHASES = {
    "import": r"imported torch in ([\d.]+) s",
    "build": r"trainer built on .* in ([\d.]+) s",
    "load": r"loaded checkpoint .* in ([\d.]+) s",
    "replay": r"replayed \d+ steps in ([\d.]+) s",
    "warm-up": r"warmed up in ([\d.]+) s",
}


def measure(quick: bool) -> list[Row]:
    """The row of P8: the seconds that are neither import nor replay."""
    found, phases = [], []
    ids = np.random.default_rng(0).integers(0, 256, (8, 128))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [SERVER, "serve", f"--run-dir={folder}/run", "--set=serve.address=127.0.0.1:0"]
        for _ in range(3 if quick else 7):
            process = start(command, log)
            with maskwire.connect(process.address) as trainer:
                for _ in range(5):
                    trainer.train_step(ids)
                process.send_signal(signal.SIGKILL)
                process.wait()
            log.write_text("")
            began = time.perf_counter()
            process = start(command, log)
            with maskwire.connect(process.address) as trainer:
                trainer.train_step(ids)
                took = time.perf_counter() - began
            process.terminate()
            process.wait()
            text = log.read_text()
            seen = {
                name: float(match[1]) for name, regex in PHASES.items() if (match := re.search(regex, text))
            }
            seen["build"] -= seen["import"]
            phases.append(seen)
            found.append(took - seen.get("import", 0.0) - seen.get("replay", 0.0))
    value = statistics.median(found)
    parts = {f"{name} s": statistics.median(p.get(name, 0.0) for p in phases) for name in PHASES}
    what = "kill -9 to the next applied step, without import and replay, seconds"
    return [Row("P8", what, "≤ 2 s", value, min(found), max(found), value <= 2, parts=parts)]


class Started(subprocess.Popen):  # type: ignore[type-arg]
    """A server process and its address."""

    address = ""


def start(command: list[str], log: Path) -> Started:
    with log.open("a") as stderr:
        process = Started(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.address = line.partition(READY)[2].strip()
    return process
