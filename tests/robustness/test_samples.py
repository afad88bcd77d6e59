"""A small sample of the campaign, on fixed seeds; `make robustness` runs it whole."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from faults import KINDS
from robustness import (
    damage,
    failpoint_faults,
    malformed,
    planted,
    power_loss,
    rank_faults,
    rank_wire,
    report,
    soak,
    wire_faults,
)

from maskwire_server import failpoints


def test_faults_on_the_wire_lose_and_double_nothing(tmp_path: Path) -> None:
    found = wire_faults.run(tmp_path / "s", 7, steps=80, faults=44)
    assert set(found["faults"]) == set(wire_faults.KINDS)


@pytest.mark.parametrize(("place", "kind"), list(zip(failpoints.NAMES[::2], cycle(KINDS), strict=False)))
def test_a_fault_at_a_failpoint_loses_nothing(tmp_path: Path, place: str, kind: str) -> None:
    reached = failpoint_faults.run(tmp_path / "s", place, kind, 0)
    assert reached or place.startswith(("session.", "step.")), "the fault is not where it is looked for"


@pytest.mark.skipif(power_loss.strace() is None, reason="records system calls with strace, which is not here")
def test_a_power_loss_after_any_call_loses_nothing_acknowledged(tmp_path: Path) -> None:
    found = power_loss.campaign(tmp_path / "p", 0, every=9, singles=2)
    assert found["outcomes"]["recovered"] > 50


def test_damaged_files_are_found_or_change_nothing(tmp_path: Path) -> None:
    found = damage.campaign(tmp_path / "d", 1, flips=5, cuts=3)
    assert found["damages"] > 130


def test_the_files_of_two_checkpoints_exchanged_are_found(tmp_path: Path) -> None:
    assert damage.swap_of_checkpoints(tmp_path) == damage.REFUSED, "both are damaged: it says so"


def test_malformed_requests_are_refused(tmp_path: Path) -> None:
    assert malformed.in_process(3, 10_000)["answers"]["INVALID_FIELD"] > 1000
    assert malformed.over_the_wire(tmp_path / "w", 3, 500)["codes"]["INVALID_ARGUMENT"] > 50


def test_many_calls_leave_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    assert soak.run(tmp_path / "s", 3, 1_000)["calls"] == 1_000


@pytest.mark.parametrize("seed", range(4))
def test_sigterm_at_a_random_instant_ends_cleanly(tmp_path: Path, seed: int) -> None:
    failpoint_faults.terminate(tmp_path / "s", seed)


FOUND_BY_MUCH_WORK = {
    "checkpoint-files-not-verified",  # damage to every file
    *(name for name, bug in planted.BUGS.items() if planted.traced(bug)),  # power losses
    *(name for name, bug in planted.BUGS.items() if bug.caught_by is planted.the_model),
} - {"digest-not-chained"}  # of those that the model catches, the fastest
"""Takes two minutes; `make robustness ONLY=R9` plants them too."""


@pytest.mark.parametrize("name", [name for name in planted.BUGS if name not in FOUND_BY_MUCH_WORK])
def test_a_planted_bug_is_caught(name: str) -> None:
    assert planted.caught(name)


CATCHERS = {bug.caught_by.__name__: bug.caught_by for bug in planted.BUGS.values() if not planted.traced(bug)}


@pytest.mark.parametrize("catcher", sorted(CATCHERS.keys() - {"the_model", "damage_to_files"}))
def test_what_catches_a_bug_passes_without_one(catcher: str, tmp_path: Path) -> None:
    CATCHERS[catcher](tmp_path)


def test_every_failpoint_is_passed_somewhere() -> None:
    sources = Path(failpoints.__file__).parent.rglob("*.py")
    text = "".join(path.read_text() for path in sources if path.name != "failpoints.py")
    of_ranks = (*failpoints.NAMES, *failpoints.RANK_NAMES, *failpoints.SHARD_NAMES)
    for name in of_ranks:
        assert text.count(f'passing("{name}")') == 1, name
    assert len(failpoints.NAMES) >= 25
    places = rank_faults.PLACES
    assert {*places[0], *places[1]} == set(of_ranks), "R12 kills a rank at each"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_among_what_ranks_send_is_told_from_numbers(protocol: int) -> None:
    value = {"name": "train_step", "rows": list(range(100))}
    data = pickle.dumps(value, protocol)
    assert rank_wire.has_pickle(data)
    assert rank_wire.has_pickle(b"\0" * 13 + data + b"\0") == (protocol >= 4), "others only alone"
    assert rank_wire.has_pickle(data[:150]) == (protocol >= 4), "the rest is in the next message"
    random = np.random.default_rng(0)
    for numbers in (random.bytes(2**20), random.normal(size=2**17).astype(np.float32).tobytes()):
        assert not rank_wire.has_pickle(numbers)
    framed = b"".join(b"\x80" + bytes([protocol, 0x95]) + random.bytes(20) for _ in range(10_000))
    assert not rank_wire.has_pickle(framed), "the length of the frame is not one"


def test_the_table_says_what_failed_and_at_which_revision() -> None:
    before = "| R1 | old | 1 of 2 | 0 | 3 s | 2026-01-01 |"
    notes = {"full R9 a bug": {"found": {}, "seconds": 4.0, "date": "2026-02-02", "revision": "abc"}}
    planned = {"full": Counter({"R1": 2, "R9": 1}), "short": Counter()}
    lines = report.table(notes, planned, Counter({"R1": 2}), report.rows(before)).splitlines()
    assert lines[-2:] == [
        "| R1 | nothing held | 0 of 2 | in 2 cases | | |",
        "| R9 | 1 planted bugs: 1 caught | 1 of 1 | 0 | 4 s | 2026-02-02, abc |",
    ]


def test_the_table_keeps_the_rows_of_what_was_not_run_again() -> None:
    before = "| R1 | old | 1 of 2 | 0 | 3 s | 2026-01-01 |\n| R9 | old | 1 of 2 | 0 | 3 s | 2026-01-01 |"
    notes = {"full R9 a bug": {"found": {}, "seconds": 4.0, "date": "2026-02-02"}}
    planned = {"full": Counter({"R1": 2, "R8": 4, "R9": 1}), "short": Counter()}
    lines = report.table(notes, planned, Counter(), report.rows(before)).splitlines()
    assert lines[-3:] == [
        "| R1 | old | 1 of 2 | 0 | 3 s | 2026-01-01 |",
        "| R8 | not run | 0 of 4 | | | |",
        "| R9 | 1 planted bugs: 1 caught | 1 of 1 | 0 | 4 s | 2026-02-02 |",
    ]
