"""The suite's own rules: a test that meets its limit fails alone, and every run draws the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, text: str, *options: str) -> str:
    """What pytest prints about a file, under the suite's configuration and its conftest."""
    (folder / "test_made.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "conftest",
         "-p", "no:cacheprovider", *options, folder / "test_made.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


INTERRUPTED = """
import asyncio, subprocess, sys, threading, time
from pathlib import Path
import pytest

@pytest.mark.timeout(1)
def test_a_sleep():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child").write_text(str(process.pid))
    time.sleep(600)

@pytest.mark.timeout(1)
def test_a_lock():
    threading.Lock().acquire() and threading.Event().wait()

@pytest.mark.timeout(1)
def test_a_process():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])

@pytest.mark.timeout(1)
def test_a_coroutine():
    asyncio.run(asyncio.sleep(600))

def test_behind_them():
    pass
"""


def test_a_limit_interrupts_one_test_and_leaves_no_process(tmp_path: Path) -> None:
    text = run(tmp_path, INTERRUPTED)
    assert "4 failed, 1 passed" in text, text[-2000:]
    assert text.count("Failed: Timeout") >= 4
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


UNINTERRUPTED = """
import signal, time
import pytest

@pytest.mark.timeout(1)
def test_that_no_signal_reaches():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(600)

def test_behind_it():
    pass
"""


def test_a_test_that_cannot_be_interrupted_costs_its_worker_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    last_resort = ("-n", "1", "-o", "faulthandler_timeout=3", "-o", "faulthandler_exit_on_timeout=true")
    text = run(tmp_path, UNINTERRUPTED, *last_resort)
    assert "1 failed, 1 passed" in text, text[-2000:]
    assert "crashed while running" in text
    assert "test_that_no_signal_reaches" in text


DRAWN = """
import random
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

@pytest.mark.parametrize("twice", range(2))
def test_draws(twice):
    print("drawn", random.random(), np.random.random(), torch.rand(()).item())

def test_examples():
    assert settings().derandomize and settings().deadline is None
"""


def test_every_test_draws_the_same(tmp_path: Path) -> None:
    text = run(tmp_path, DRAWN, "-s")
    drawn = [line[line.index("drawn") :] for line in text.splitlines() if "drawn" in line]
    assert len(drawn) == 2
    assert len(set(drawn)) == 1
    assert "3 passed" in text, text[-2000:]
