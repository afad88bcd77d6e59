"""Merge the adapters of a downloaded checkpoint into its model.

The client has no torch, so the command `maskwire-server export` merges them, on this machine. In the server's
process the merge would need memory for a second model, besides the one that is trained.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = "maskwire-server"


def merge(folder: Path, out: Path, *, ema: bool) -> None:
    """Write the model to `out` for `AutoModelForMaskedLM`. Raises ValueError that says what to do."""
    beside = Path(sys.executable).with_name(COMMAND)
    command = str(beside) if beside.exists() else shutil.which(COMMAND)
    if command is None:
        raise ValueError(
            f'--merged needs the {COMMAND} command on this machine: pip install "maskwire[huggingface]"; or '
            f"run `{COMMAND} export OUT --to huggingface --merged` with the run directory (the weights are "
            f"in {folder})"
        )
    words = [command, "export", str(out), "--folder", str(folder), "--to", "huggingface", "--merged"]
    words += ["--weights", "ema"] if ema else []
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{COMMAND}: ")]
        said = "; ".join(line.removeprefix(f"{COMMAND}: ") for line in lines) or done.stderr.strip()[-500:]
        raise ValueError(f"{said} (the weights are in {folder})")
