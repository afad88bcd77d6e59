"""Train a small model, open TensorBoard on its event files in headless Chromium, and keep a picture.

    .venv/bin/python docs/tensorboard_picture.py        writes docs/images/tensorboard.png, in a minute

Needs Chromium (Debian: chromium).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

import maskwire

PICTURE = Path(__file__).resolve().parent / "images" / "tensorboard.png"
BIN = Path(sys.executable).parent
STEPS, ROWS, COLUMNS = 240, 16, 64
SETTINGS = {
    "model.num_tokens": 257,
    "model.mask_id": 256,
    "model.max_seq_len": COLUMNS,
    "model.dim": 64,
    "model.depth": 2,
    "model.heads": 2,
    "optimizer.learning_rate": 0.003,
    "optimizer.warmup_steps": 20,
    "optimizer.total_steps": STEPS,
    "serve.address": "127.0.0.1:0",
    "serve.threads": 1,
    "telemetry.tensorboard": "true",
}
BROWSER = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-3d-apis",  # without it the curves are blank
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,1000",
    "--virtual-time-budget=20000",
)


def main() -> int:
    """Entry point; exit status 1 without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("Chromium is not installed (Debian: apt install chromium)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "run"))
        take_picture(browser, Path(folder, "run", "tensorboard"), PICTURE)
    return 0


def train(run_dir: Path) -> None:
    """A run of bytes, the standard library's sources, with evaluations and samples."""
    text = b"\n".join(
        path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    )
    data = np.frombuffer(text, np.uint8)
    flags = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    command = [str(BIN / "maskwire-server"), "serve", f"--run-dir={run_dir}", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip().rpartition(" ")[2]
        draws = np.random.default_rng(0)
        with maskwire.connect(address) as trainer:
            for step in range(1, STEPS + 1):
                trainer.train_step(batch(data, draws))
                if step % 40 == 0:
                    trainer.eval_loss(batch(data, np.random.default_rng(1)), draws=4)
            trainer.generate(count=4, length=COLUMNS)
    finally:
        server.terminate()
        server.wait(60)


def batch(data: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Rows from random places."""
    starts = draws.integers(0, len(data) - COLUMNS, ROWS)
    rows: np.ndarray = data[starts[:, None] + np.arange(COLUMNS)].astype(np.int64)
    return rows


def take_picture(browser: str, logdir: Path, picture: Path) -> None:
    """TensorBoard's first page."""
    command = [str(BIN / "tensorboard"), "--logdir", str(logdir), "--port", "0", "--host", "127.0.0.1",
               "--reload_interval", "1"]  # fmt: skip
    board = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert board.stderr is not None
        address = next(found[0] for line in board.stderr if (found := re.findall(r"http://\S+?/", line)))
        time.sleep(5)  # until it has read the files
        subprocess.run(
            [browser, *BROWSER, f"--screenshot={picture}", f"{address}?darkMode=false#scalars"],
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )
    finally:
        board.terminate()
        board.wait(30)


if __name__ == "__main__":
    sys.exit(main())
