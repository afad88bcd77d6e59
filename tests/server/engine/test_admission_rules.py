"""The admission table, row by row, as the pure function it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maskwire.v1.values import RunState
from maskwire_server.engine.admission_rules import (
    Known,
    Situation,
    admit_step,
    check_writer,
    repeats,
)
from maskwire_server.errors import Refused
from maskwire_server.requests import SessionRef, StepRequest
from maskwire_server.session_holder import ClientProcess, Holder

HASH, OTHER = b"a" * 32, b"b" * 32
MINE = SessionRef("run", 2, 5)
AT = Situation(RunState.SERVING, "run", 2, 5, "me", closed=False, next_step=10, window=4)


def admit(step: int | None = None, at: Situation = AT, queue_length: int = 0) -> bool:
    return admit_step(step, queue_length, 8, at)


def refusal(step: int | None = None, at: Situation = AT, queue_length: int = 0) -> str:
    with pytest.raises(Refused) as raised:
        admit(step, at, queue_length)
    return raised.value.reason


def writer_refusal(session: SessionRef | None, at: Situation = AT) -> str:
    with pytest.raises(Refused) as raised:
        check_writer(session, at)
    return raised.value.reason


def sent(step: int | None = None, request_id: str | None = "id", session: SessionRef | None = MINE) -> Any:
    return StepRequest(None, session, step, request_id)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        (SessionRef("other", 2, 5), "WRONG_RUN"),
        (SessionRef("run", 1, 5), "WRONG_RUN"),
        (SessionRef("run", 2, 4), "FENCED"),
        (SessionRef("run", 2, 6), "UNKNOWN_EPOCH"),
    ],
)
def test_a_session_of_another_run_lineage_or_epoch_is_refused(session: SessionRef, reason: str) -> None:
    assert writer_refusal(session) == reason


def test_a_closed_session_is_unknown() -> None:
    assert writer_refusal(MINE, replace(AT, closed=True, writer="")) == "UNKNOWN_EPOCH"


def test_a_bare_call_is_refused_while_a_session_is_open_and_runs_otherwise() -> None:
    assert writer_refusal(None) == "WRITER_PRESENT"
    check_writer(None, replace(AT, writer=""))


@pytest.mark.parametrize("number", [None, 7])
def test_a_request_with_a_known_id_and_hash_is_a_repetition(number: int | None) -> None:
    assert repeats(sent(number), HASH, Known(7, "id", HASH))
    assert repeats(sent(number), HASH, Known(None, "id", HASH)), "on its way, without a number"


@pytest.mark.parametrize(("number", "payload_hash"), [(None, OTHER), (7, OTHER), (8, HASH), (8, OTHER)])
def test_a_known_id_with_another_payload_or_step_is_a_mismatch(number: int, payload_hash: bytes) -> None:
    with pytest.raises(Refused) as raised:
        repeats(sent(number), payload_hash, Known(7, "id", HASH))
    assert raised.value.reason == "PAYLOAD_MISMATCH"


@pytest.mark.parametrize(("number", "words"), [(7, "another payload (step 7);"), (None, "another payload;")])
def test_a_mismatch_names_the_step_once_it_has_a_number(number: int | None, words: str) -> None:
    with pytest.raises(Refused) as raised:
        repeats(sent(None), OTHER, Known(number, "id", HASH))
    assert words in str(raised.value)


def test_another_id_is_another_request_and_without_one_the_hash_tells() -> None:
    assert not repeats(sent(7, "other"), HASH, Known(7, "id", HASH))
    assert not repeats(sent(7, "other"), HASH, Known(7, None, HASH))
    assert repeats(sent(7, None), HASH, Known(7, "id", HASH))
    assert not repeats(sent(7, None), OTHER, Known(7, "id", HASH))
    assert not repeats(sent(7, None, None), HASH, Known(7, None, HASH)), "a bare call promises nothing"


def test_the_next_step_runs_with_and_without_its_number() -> None:
    assert admit(10)
    assert admit(None)


def test_a_step_ahead_waits_within_the_window_and_is_a_gap_beyond_it() -> None:
    assert not admit(11)
    assert not admit(13)
    assert refusal(14) == "GAP"


def test_a_step_behind_a_refused_one_is_a_gap_at_once() -> None:
    assert refusal(11, replace(AT, refused_step=10)) == "GAP"
    assert admit(10, replace(AT, refused_step=10))
    with pytest.raises(Refused) as raised:
        admit(13, replace(AT, refused_step=12))
    assert raised.value.metadata == {"step": "13", "expected_step": "12"}
    assert not admit(12, replace(AT, refused_step=12))
    assert admit(None, replace(AT, refused_step=10))


def test_a_gap_names_the_step_that_is_expected() -> None:
    with pytest.raises(Refused) as raised:
        admit(99)
    assert raised.value.metadata == {"step": "99", "expected_step": "10"}


def test_a_full_queue_refuses_what_would_run_or_wait() -> None:
    assert refusal(queue_length=8) == "QUEUE_FULL"
    assert refusal(11, queue_length=8) == "QUEUE_FULL"


CLOSED = [RunState.RECOVERING, RunState.RESTORING, RunState.HELD, RunState.DRAINING, RunState.HALTED]
"""The states that admit no step."""


@pytest.mark.parametrize("state", CLOSED, ids=lambda state: state.name)
def test_states_that_admit_nothing_say_which_they_are(state: RunState) -> None:
    assert refusal(at=replace(AT, state=state)) == state.name


def test_a_gap_is_found_before_a_full_queue() -> None:
    assert refusal(14, queue_length=8) == "GAP"
    assert refusal(11, replace(AT, refused_step=10), queue_length=8) == "GAP"


@pytest.mark.parametrize("state", CLOSED, ids=lambda state: state.name)
def test_a_gap_and_then_a_full_queue_are_found_before_the_state(state: RunState) -> None:
    at = replace(AT, state=state)
    assert refusal(14, at) == refusal(14, at, queue_length=8) == "GAP"
    assert refusal(11, replace(at, refused_step=10)) == "GAP"
    assert refusal(10, at, queue_length=8) == "QUEUE_FULL"
    assert refusal(None, at, queue_length=8) == "QUEUE_FULL"


def test_a_refusal_names_the_client_that_has_the_session_or_had_it_last() -> None:
    process = ClientProcess("host", 7, 123, "boot", "pid:[1]", "slurm:1:0")
    at = replace(AT, writer="", closed=True, holder=Holder("last", 5, process))
    with pytest.raises(Refused, match=r"'last' \(host host, process 7\) took over") as raised:
        check_writer(SessionRef("run", 2, 4), at)
    assert raised.value.metadata == {
        "epoch": "5", "session_epoch": "4", "writer": "last", "writer_host": "host",
        "writer_process_id": "7", "writer_start_time_ticks": "123", "writer_boot_id": "boot",
        "writer_pid_namespace": "pid:[1]", "writer_job": "slurm:1:0",
    }  # fmt: skip
