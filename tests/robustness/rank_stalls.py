"""R12: the leader of two ranks freezes while it trains; two ranks are idle for longer than any time limit."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rank_groups import RankServer
from robustness.rank_faults import RESTART_SECONDS, SETTINGS, SIZE, outcome, work

import maskwire

TIMEOUT = 10.0
"""`distributed.rank_timeout_seconds`."""
SLACK = 5.0
"""How much later than at its limit a loss may be noticed; a beat takes 1 s."""
LAUNCHER_SECONDS = 30.0
"""How long torch's launcher may wait for a frozen process before it kills it."""
SHORT = 20
IDLE_SECONDS = 60.0
LIMITS = (
    f"distributed.rank_timeout_seconds={SHORT}", f"serve.step_timeout_seconds={SHORT}",
    f"serve.session_idle_seconds={SHORT}", f"serve.max_read_seconds={SHORT}", f"serve.drain_seconds={SHORT}",
)  # fmt: skip


def frozen_leader(folder: Path) -> dict[str, Any]:
    """The leader stops (SIGSTOP) with a step in flight: its follower notices. Raises AssertionError."""
    expected = outcome(folder / "undisturbed")
    server = RankServer(folder / "frozen", SIZE, *SETTINGS, f"distributed.rank_timeout_seconds={TIMEOUT}")
    times: dict[str, float] = {}

    def freeze(step: int, pending: Future[maskwire.StepResult]) -> None:
        if step != 5:
            return
        server.ranks()[0].suspend()
        began = time.monotonic()
        while "the leader was silent for" not in server.log.read_text():
            assert time.monotonic() - began < 6 * TIMEOUT, "the follower noticed nothing"
            time.sleep(0.1)
        times["noticed"] = time.monotonic() - began
        assert pending.result().step == step
        times["back"] = time.monotonic() - began

    try:
        found = work(server, freeze)
        assert server.restarts() == 1
        with maskwire.attach(server.target) as client:
            assert client.status().last_error == f"the leader was silent for {TIMEOUT:g} s"
        assert server.stop() == 0
    finally:
        server.kill()
    assert found == expected, f"{found} instead of {expected}"
    assert times["noticed"] <= TIMEOUT + SLACK, times
    assert times["back"] <= TIMEOUT + LAUNCHER_SECONDS + RESTART_SECONDS, times
    return times


def idle(folder: Path, patch: str = "short_timeouts") -> dict[str, Any]:
    """No request for 60 s while every time limit is 20 s: nothing restarts, and the next steps are right.

    Raises AssertionError.
    """
    expected = outcome(folder / "undisturbed")
    server = RankServer(folder / "idle", SIZE, *SETTINGS, *LIMITS, patch=patch)
    processes = []

    def wait(step: int, pending: Future[maskwire.StepResult]) -> None:
        if step == 5:
            pending.result()
            processes.append(server.ranks())
            time.sleep(IDLE_SECONDS)

    try:
        found = work(server, wait)
        processes.append(server.ranks())
        assert server.stop() == 0
    finally:
        server.kill()
    before, after = ({rank: process.pid for rank, process in each.items()} for each in processes)
    assert len(before) == SIZE
    assert after == before, (
        f"the ranks {before} are {after} after {IDLE_SECONDS:g} s: {server.log.read_text()[-2000:]}"
    )
    assert found == expected, f"{found} instead of {expected}"
    return {"idle": IDLE_SECONDS, "limits": SHORT}
