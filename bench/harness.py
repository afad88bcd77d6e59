"""Rows of the table, pairs measured in turn, and the processes that are measured."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY = "listening on "
WARM = 3  # steps before those that are measured
HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    """One row of the table."""

    name: str
    what: str
    target: str
    value: float | None
    """None: not measured, and `note` says why."""
    low: float | None = None
    high: float | None = None
    met: bool | None = None
    note: str = ""
    on: str = ""
    """The day that it was measured."""
    parts: dict[str, float] = field(default_factory=dict)
    """The figures behind the value."""


def ratio(
    row: Row, above: Sequence[float], below: Sequence[float], *, at_least: float | None = None,
    at_most: float | None = None,
) -> Row:  # fmt: skip
    """Fill a row with the median of the pairs' ratios and their spread."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    row.value, row.low, row.high = statistics.median(found), min(found), max(found)
    if at_least is not None:
        row.met = row.value >= at_least
    if at_most is not None:
        row.met = row.value <= at_most
    return row


def in_turn(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Run each measure `rounds` times in turn (A B A B), so that slow phases of the machine affect all."""
    found: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for values, measure in zip(found, measures, strict=True):
            values.append(measure())
    return found


@contextmanager
def process(*command: str, log: Path) -> Iterator[str]:
    """Run a process and yield the address that it listens on; end it with the block."""
    with log.open("a") as stderr:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert started.stdout is not None
        for line in started.stdout:
            if READY in line:
                yield line.partition(READY)[2].strip()
                return
        raise RuntimeError(f"{command[0]} did not start; the end of {log}:\n{log.read_text()[-2000:]}")
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        if started.stdout is not None:
            started.stdout.close()


def module(name: str, *arguments: object) -> list[str]:
    """A module of this package as a command."""
    return [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]


def seconds_of(act: Callable[[], object], count: int) -> float:
    """Mean seconds of `count` calls."""
    began = time.perf_counter()
    for _ in range(count):
        act()
    return (time.perf_counter() - began) / count


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_flight_steps(trainer: Any, ids: Any, count: int) -> float:
    """Steps per second, with the trainer's whole window in flight."""
    began = time.perf_counter()
    futures = [trainer.submit(ids) for _ in range(count)]
    for future in futures:
        future.result()
    return count / (time.perf_counter() - began)


def report(seconds: list[float], masked: float, *, tokens: int = 0) -> None:
    """Print what was measured. The median step is one that other guests of the host did not interrupt."""
    found = {
        "steps_per_second": len(seconds) / sum(seconds),
        "median_steps_per_second": 1 / statistics.median(seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "masked": masked,
        "tokens": tokens,
    }
    print(json.dumps(found))
