"""Merge the adapters of a downloaded checkpoint into its model.

The client has no torch, so it runs the command `maskwire-server export` on this machine. The server does not
merge them, because its process would need memory for a second model, besides the one that is trained.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = "maskwire-server"


def merge(folder: Path, out: Path, *, ema: bool) -> None:
    """Merge the adapters of the checkpoint in `folder`, and write the model to the folder `out`.

    `AutoModelForMaskedLM` can load the result. With `ema`, the moving average of the weights is used. Raises
    ValueError if `maskwire-server` is missing or fails.
    """
    beside = Path(sys.executable).with_name(COMMAND)
    command = str(beside) if beside.exists() else shutil.which(COMMAND)
    if command is None:
        raise ValueError(
            f'--merged needs the {COMMAND} command on this machine: pip install "maskwire[huggingface]"; or '
            f"run `{COMMAND} export OUT --to huggingface --merged` where the run directory is (the "
            f"downloaded weights are in {folder})"
        )
    words = [command, "export", str(out), "--folder", str(folder), "--to", "huggingface", "--merged"]
    words += ["--weights", "ema"] if ema else []
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{COMMAND}: ")]
        said = "; ".join(line.removeprefix(f"{COMMAND}: ") for line in lines) or done.stderr.strip()[-500:]
        raise ValueError(f"the adapters cannot be merged: {said} (the downloaded weights are in {folder})")
