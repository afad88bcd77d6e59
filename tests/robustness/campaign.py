"""The campaign: python -m robustness [R1 R4 …] [--full] [--jobs N], or `make robustness`.

Each case is noted when it is done, in .robustness.json, so that a campaign that was stopped goes on;
--again starts from scratch. The table of docs/robustness.md is written from the notes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import KINDS
from robustness import (
    damage,
    failpoint_faults,
    malformed,
    mirror_faults,
    planted,
    power_loss,
    processes,
    rank_faults,
    rank_layouts,
    rank_stalls,
    rank_wire,
    soak,
    wire_faults,
)
from robustness.report import write_report

from maskwire_server import failpoints

NOTES = processes.ROOT / ".robustness.json"
COMPUTING = ("R12", "R13")
LONGEST = ("R5", "R7")
"""Targets whose single cases take the longest: they begin first."""


@dataclass(frozen=True)
class Case:
    """One thing to run; it raises when something was lost."""

    target: str
    name: str
    run: Callable[[Path], Any]


def _r1(seed: int, folder: Path) -> Any:
    return wire_faults.run(folder / "s", seed)


def _r2(place: str, kind: str, times: int, folder: Path) -> Any:
    reached = [failpoint_faults.run(folder / str(seed), place, kind, seed) for seed in range(times)]
    assert any(reached), "the place was never passed: the fault is not where it is looked for"
    return {"runs": times, "reached": sum(reached)}


def _power(seed: int, folder: Path) -> Any:
    return power_loss.campaign(folder / "p", seed, singles=1000)


def _r4(seed: int, flips: int, cuts: int, folder: Path) -> Any:
    return damage.campaign(folder / "d", seed, flips=flips, cuts=cuts)


def _r5(runs: int, _: Path) -> Any:
    environment = {**os.environ, "MASKWIRE_MODEL_RUNS": str(runs), "MASKWIRE_MODEL_STEPS": "50"}
    test = processes.ROOT / "tests" / "robustness" / "test_writer_model.py"
    # Dumping the stacks of a process that takes hours, as the suite does after ten minutes, may crash it.
    unlimited = ["--timeout=0", "-o", "faulthandler_timeout=0"]
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", *unlimited, str(test)]
    done = subprocess.run(
        command, env=environment, cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr)[-4000:]
    assert done.returncode == 0, f"pytest ended with {done.returncode}: {said}"
    return {"runs": runs, "operations": 50}


def _r6_process(seed: int, count: int, _: Path) -> Any:
    return malformed.in_process(seed, count)


def _r6_wire(seed: int, count: int, folder: Path) -> Any:
    return malformed.over_the_wire(folder / "w", seed, count)


def _r7(count: int, folder: Path) -> Any:
    return soak.run(folder / "s", 0, count)


def _r8(first: int, count: int, folder: Path) -> Any:
    ends = [failpoint_faults.terminate(folder / str(seed), seed) for seed in range(first, first + count)]
    return {"terminations": count, "while training": sum(end > 0 for end in ends)}


def _r9(name: str, _: Path) -> Any:
    words = planted.caught(name).strip().splitlines() or [""]
    return {"what": planted.BUGS[name].what, "said": words[0][:160]}


def _r12_places(rank: int, places: list[str], folder: Path) -> Any:
    return rank_faults.at_failpoints(folder, rank, places)


def _r12_random(kills: int, folder: Path) -> Any:
    return rank_faults.at_random(folder, 1, kills)


def _r12_hung(folder: Path) -> Any:
    return rank_faults.hung_follower(folder)


def _r12_frozen(folder: Path) -> Any:
    return rank_faults.frozen_start(folder)


def _r12_leader(folder: Path) -> Any:
    return rank_stalls.frozen_leader(folder)


def _r12_idle(folder: Path) -> Any:
    return rank_stalls.idle(folder)


def _r12_wire(folder: Path) -> Any:
    return rank_wire.scan(folder)


def _r12_stopped(folder: Path) -> Any:
    return rank_faults.stopped_hosts(folder / "s")


def _r12_different(folder: Path) -> Any:
    return rank_faults.different_hosts(folder / "d")


def _r12_network(folder: Path) -> Any:
    return rank_faults.cut_network(folder / "n")


def _r12_hidden(folder: Path) -> Any:
    return rank_faults.hidden_folder(folder / "h")


def _r13(steps: int, _: Path) -> Any:
    environment = {**os.environ, "MASKWIRE_PARITY_STEPS": str(steps)}
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=0", str(processes.ROOT / "tests" / "ranks")]
    done = subprocess.run(
        command, env=environment, cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return {"steps": steps}


def _r13_layouts(folder: Path) -> Any:
    return rank_layouts.other_layouts(folder)


def _r14_lost(acknowledge: str, instants: int, folder: Path) -> Any:
    return mirror_faults.lose_machines(folder, acknowledge, instants)


def _r14_faults(acknowledge: str, faults: int, seed: int, folder: Path) -> Any:
    return mirror_faults.inject(folder, acknowledge, faults, seed)


def _r14_places(places: list[str], times: int, folder: Path) -> Any:
    return mirror_faults.at_failpoints(folder, places, times)


def _r14_two(acknowledge: str, rounds: int, folder: Path) -> Any:
    return mirror_faults.two_servers(folder, acknowledge, rounds)


@dataclass(frozen=True)
class _Bound:
    """A case's function with its arguments: what a process pool can carry."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, folder: Path) -> Any:
        return self.function(*self.arguments, folder)


def cases(full: bool) -> list[Case]:
    """Everything, with the numbers of the targets, or with a share of them."""

    def share(all_of_them: int, some: int) -> int:
        return all_of_them if full else some

    def case(target: str, name: str, function: Callable[..., Any], *arguments: Any) -> Case:
        return Case(target, name, _Bound(function, arguments))

    made = [case("R1", f"seed {seed}", _r1, seed) for seed in range(share(20, 2))]
    for place in failpoints.NAMES:
        for kind in KINDS:
            made.append(case("R2", f"{place} {kind}", _r2, place, kind, share(20, 2)))
    made.append(case("R3", "every system call", _power, 0))
    made.append(case("R4", "every file", _r4, 0, share(200, 40), share(50, 10)))
    made += [case("R5", f"the model {i}", _r5, share(2_500, 75)) for i in range(4)]
    made += [case("R6", f"in process {i}", _r6_process, i, share(250_000, 25_000)) for i in range(4)]
    made += [case("R6", f"over the wire {i}", _r6_wire, i, share(25_000, 1_000)) for i in range(4)]
    made.append(case("R7", "soak", _r7, share(1_000_000, 50_000)))
    made += [case("R8", f"from {i}", _r8, i, share(50, 10)) for i in (0, 50, 100, 150)]
    made += [case("R9", name, _r9, name) for name in planted.BUGS]
    for rank, places in rank_faults.PLACES.items():
        chosen = places[:: share(1, 8)]
        for start in range(0, len(chosen), 6):
            part = list(chosen[start : start + 6])
            made.append(case("R12", f"rank {rank} from {part[0]}", _r12_places, rank, part))
    made.append(case("R12", "random instants", _r12_random, share(50, 5)))
    made.append(case("R12", "hung follower", _r12_hung))
    made.append(case("R12", "frozen start", _r12_frozen))
    made.append(case("R12", "frozen leader", _r12_leader))
    made.append(case("R12", "idle", _r12_idle))
    made.append(case("R12", "wire", _r12_wire))
    if os.geteuid() == 0 and shutil.which("ip"):
        made.append(case("R12", "network", _r12_network))
        made.append(case("R12", "both hosts stopped", _r12_stopped))
        made.append(case("R12", "different hosts", _r12_different))
        made.append(case("R12", "no shared folder", _r12_hidden))
    made.append(case("R13", "parity", _r13, share(50, 5)))
    made.append(case("R13", "other layouts", _r13_layouts))
    for acknowledge in ("local", "mirrored"):
        made.append(case("R14", f"machines lost, {acknowledge}", _r14_lost, acknowledge, share(20, 2)))
        for seed in range(share(5, 1)):
            made.append(case("R14", f"faults {seed}, {acknowledge}", _r14_faults, acknowledge, 20, seed))
        made.append(case("R14", f"two servers, {acknowledge}", _r14_two, acknowledge, share(10, 1)))
    for start in range(0, len(failpoints.MIRROR_NAMES), 4):
        places = list(failpoints.MIRROR_NAMES[start : start + 4])
        made.append(case("R14", f"failpoints from {places[0]}", _r14_places, places, share(3, 1)))
    return made


def run_case(case: Case) -> tuple[str, Any, float]:
    """One case in a room of its own: "" or what went wrong, what it found, how long it took."""
    logging.getLogger("maskwire_server").setLevel(logging.CRITICAL + 1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mw", ignore_cleanup_errors=True) as room:
        try:
            found = case.run(Path(room))
            return "", found, time.monotonic() - began
        except (Exception, BaseExceptionGroup) as error:
            return f"{type(error).__name__}: {error}"[:4000], None, time.monotonic() - began


def _results(todo: list[Case], jobs: int) -> Iterator[tuple[Case, tuple[str, Any, float]]]:
    """Each case with what `run_case` gives, in the order in which they end.

    A case that kills servers waits most of its time, so several run at once. Those of `COMPUTING` use all
    cores by themselves and state how long a group took to come back, so they run one after another.
    """
    context = multiprocessing.get_context("spawn")
    for computing, workers in ((False, jobs), (True, 1)):
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            chosen = [case for case in todo if (case.target in COMPUTING) == computing]
            chosen.sort(key=lambda case: case.target not in LONGEST)
            running = {pool.submit(run_case, case): case for case in chosen}
            for future in as_completed(running):
                yield running[future], future.result()


def _revision() -> str:
    """The commit that is tested; empty where there is no git."""
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(
            command, cwd=processes.ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    return ""


def main() -> int:
    """Run what was asked for and is not noted yet."""
    parser = argparse.ArgumentParser(prog="robustness", description=__doc__)
    parser.add_argument("targets", nargs="*", help="R1 … R9, R12 … R14; all by default")
    parser.add_argument("--full", action="store_true", help="the numbers of the targets: about 2 hours")
    parser.add_argument("--again", action="store_true", help="forget what was done before")
    parser.add_argument(
        "--jobs", type=int, default=2 * (os.cpu_count() or 2), help="cases at once, but for those of ranks"
    )
    asked = parser.parse_args()
    notes: dict[str, Any] = {}
    if NOTES.exists() and not asked.again:
        notes = {name: note for name, note in json.loads(NOTES.read_text()).items() if "revision" in note}
    size = "full" if asked.full else "short"
    todo = [
        case
        for case in cases(asked.full)
        if (not asked.targets or case.target in asked.targets)
        and f"{size} {case.target} {case.name}" not in notes
    ]
    revision = _revision()
    others = sum(note.get("revision") != revision for note in notes.values())
    print(
        f"{len(todo)} cases to run, {len(notes)} done before, {others} of them at another revision "
        "(--again forgets them)",
        flush=True,
    )
    failed: Counter[str] = Counter()
    number = 0
    for case, (problem, found, seconds) in _results(todo, asked.jobs):
        number += 1
        if problem:
            failed[case.target] += 1
            print(f"{case.target} {case.name}: FAILED: {problem}", flush=True)
            continue
        notes[f"{size} {case.target} {case.name}"] = {
            "found": found, "seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"),
            "revision": revision,
        }  # fmt: skip
        NOTES.write_text(json.dumps(notes, indent=1))
        print(f"[{number}/{len(todo)}] {case.target} {case.name}: held, {seconds:.0f} s", flush=True)
    planned = {
        name: Counter(case.target for case in cases(full))
        for name, full in (("full", True), ("short", False))
    }
    write_report(notes, planned, failed)
    if failed:
        print(f"failed: {dict(failed)}; what held is noted, run it again after the mend", flush=True)
    return 1 if failed else 0
