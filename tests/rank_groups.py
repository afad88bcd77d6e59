"""Starts groups of ranks as real processes that talk over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "ranks" / "parity_worker.py"
SECONDS = 240.0


def compare(folder: Path, size: int, steps: int, scenarios: dict[str, Any]) -> dict[str, Any]:
    """What each scenario found on a group of this size; fails with what a rank that failed said last."""
    given, out = folder / "scenarios.json", folder / "out.json"
    given.write_text(json.dumps({"steps": steps, "scenarios": scenarios}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = []
    for rank in range(size):
        words = [str(WORKER), str(rank), str(size), str(folder / "store"), str(given), str(out)]
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
            )
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = {rank: (folder / f"rank{rank}.log").read_text()[-1500:] for rank, code in enumerate(codes) if code}
    assert not said, "\n".join(said.values())
    found: dict[str, Any] = json.loads(out.read_text())
    return found
