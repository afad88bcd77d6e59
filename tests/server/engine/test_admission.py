"""The admission table, row by row, as the pure function it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maskwire_server.engine.admission import (
    Known,
    Position,
    SessionFacts,
    StepFacts,
    Verdict,
    admit_session,
    admit_step,
)
from maskwire_server.errors import Refused
from maskwire_server.holder import ClientProcess, Holder
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SessionRef, SessionRequest
from maskwire_server.results import RunState

HASH, OTHER = b"a" * 32, b"b" * 32
MINE = SessionRef("run", 2, 5)
AT = Position(RunState.SERVING, "run", 2, 5, "me", closed=False, next_step=10, window=4)
FACTS = StepFacts(MINE, None, HASH, None, step_waits=False, queue_length=0, queue_limit=8)


def refusal(facts: StepFacts, at: Position = AT) -> str:
    with pytest.raises(Refused) as raised:
        admit_step(facts, at)
    return raised.value.reason


def step(**changes: Any) -> StepFacts:
    return replace(FACTS, **changes)


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
    assert refusal(step(session=session)) == reason


def test_a_closed_session_is_unknown() -> None:
    assert refusal(step(), replace(AT, closed=True, writer="")) == "UNKNOWN_EPOCH"


def test_a_bare_call_is_refused_while_a_session_is_open_and_runs_otherwise() -> None:
    assert refusal(step(session=None)) == "WRITER_PRESENT"
    assert admit_step(step(session=None), replace(AT, writer="")) is Verdict.RUN


@pytest.mark.parametrize("number", [None, 7])
def test_a_known_request_gets_its_recorded_answer(number: int | None) -> None:
    known = Known(7, HASH, in_flight=False)
    assert admit_step(step(step=number, known=known), AT) is Verdict.REPLAY
    assert admit_step(step(step=number, known=replace(known, in_flight=True)), AT) is Verdict.JOIN


@pytest.mark.parametrize("state", [RunState.HELD, RunState.DRAINING, RunState.HALTED])
def test_a_recorded_answer_is_given_in_every_state(state: RunState) -> None:
    known = Known(7, HASH, in_flight=False)
    assert admit_step(step(known=known, queue_length=8), replace(AT, state=state)) is Verdict.REPLAY


def test_a_known_request_with_another_payload_or_step_is_a_mismatch() -> None:
    assert refusal(step(known=Known(7, OTHER, in_flight=False))) == "PAYLOAD_MISMATCH"
    assert refusal(step(step=8, known=Known(7, HASH, in_flight=True))) == "PAYLOAD_MISMATCH"


def test_a_step_that_is_applied_in_flight_or_waited_for_is_taken() -> None:
    assert refusal(step(step=9)) == "STEP_TAKEN"
    assert refusal(step(step=1)) == "STEP_TAKEN"
    assert refusal(step(step=12, step_waits=True)) == "STEP_TAKEN"


def test_the_next_step_runs_with_and_without_its_number() -> None:
    assert admit_step(step(step=10), AT) is Verdict.RUN
    assert admit_step(step(step=None), AT) is Verdict.RUN


def test_a_step_ahead_waits_within_the_window_and_is_a_gap_beyond_it() -> None:
    assert admit_step(step(step=11), AT) is Verdict.WAIT
    assert admit_step(step(step=13), AT) is Verdict.WAIT
    assert refusal(step(step=14)) == "GAP"


def test_a_step_behind_a_refused_one_is_a_gap_at_once() -> None:
    assert refusal(step(step=11), replace(AT, refused_step=10)) == "GAP"
    assert admit_step(step(step=10), replace(AT, refused_step=10)) is Verdict.RUN
    with pytest.raises(Refused) as raised:
        admit_step(step(step=13), replace(AT, refused_step=12))
    assert raised.value.metadata == {"step": "13", "expected_step": "12"}
    assert admit_step(step(step=12), replace(AT, refused_step=12)) is Verdict.WAIT
    assert admit_step(step(step=None), replace(AT, refused_step=10)) is Verdict.RUN


def test_a_gap_names_the_step_that_is_expected() -> None:
    with pytest.raises(Refused) as raised:
        admit_step(step(step=99), AT)
    assert raised.value.metadata == {"step": "99", "expected_step": "10"}


def test_a_full_queue_refuses_what_would_run_or_wait() -> None:
    assert refusal(step(queue_length=8)) == "QUEUE_FULL"
    assert refusal(step(step=11, queue_length=8)) == "QUEUE_FULL"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (RunState.RECOVERING, "RECOVERING"),
        (RunState.RESTORING, "RESTORING"),
        (RunState.HELD, "HELD"),
        (RunState.DRAINING, "DRAINING"),
        (RunState.HALTED, "HALTED"),
    ],
)
def test_states_that_admit_nothing_say_which_they_are(state: RunState, reason: str) -> None:
    assert refusal(step(), replace(AT, state=state)) == reason


def opening(at: Position = AT, **changes: Any) -> bool | str:
    given = {
        name: changes.pop(name)
        for name in ("nonce_epoch", "durable_step", "recorded_digest")
        if name in changes
    }
    request = SessionRequest(**{"client_name": "me", "nonce": "n", **changes})
    facts = SessionFacts(
        request, **{"nonce_epoch": None, "durable_step": 9, "recorded_digest": None, **given}
    )
    try:
        return admit_session(facts, at)
    except Refused as error:
        return error.reason


def test_the_same_name_takes_its_session_over_and_another_needs_takeover() -> None:
    assert opening() is True
    assert opening(client_name="you") == "WRITER_PRESENT"
    assert opening(client_name="you", takeover=True) is True
    assert opening(replace(AT, writer=""), client_name="you") is True


def test_a_nonce_gets_its_own_epoch_again_until_it_is_superseded_or_closed() -> None:
    assert opening(nonce_epoch=5) is False
    assert opening(nonce_epoch=4) == "FENCED"
    assert opening(replace(AT, closed=True), nonce_epoch=5) == "UNKNOWN_EPOCH"


def test_a_process_that_held_an_older_epoch_is_fenced_whatever_its_name() -> None:
    assert opening(held_epoch=4) == "FENCED"
    assert opening(held_epoch=4, takeover=True) == "FENCED"
    assert opening(held_epoch=5) is True


@pytest.mark.parametrize(
    ("history", "recorded", "expected"),
    [
        (HistoryPosition("run", 2, 9, HASH), HASH, True),
        (HistoryPosition("run", 2, 10, HASH), None, "HISTORY_LOST"),
        (HistoryPosition("run", 2, 9, HASH), OTHER, "HISTORY_LOST"),
        (HistoryPosition("run", 2, 3, HASH), None, "HISTORY_LOST"),
        (HistoryPosition("other", 2, 9, HASH), HASH, "WRONG_RUN"),
        (HistoryPosition("run", 1, 9, HASH), HASH, "WRONG_RUN"),
    ],
)
def test_the_clients_history_must_be_the_servers(
    history: HistoryPosition, recorded: bytes | None, expected: bool | str
) -> None:
    assert opening(history=history, recorded_digest=recorded) == expected


def test_the_session_of_a_process_that_is_gone_is_taken_over_by_its_epoch_alone() -> None:
    assert opening(client_name="you", gone_epoch=5) is True
    assert opening(client_name="you", gone_epoch=4) == "WRITER_PRESENT", "another has opened one since"
    assert opening(client_name="you", gone_epoch=6) == "WRITER_PRESENT"
    assert opening(client_name="you", gone_epoch=5, held_epoch=4) == "FENCED"


def test_a_refusal_names_the_client_that_has_the_session_or_had_it_last() -> None:
    process = ClientProcess("host", 7, 123, "boot", "pid:[1]", "slurm:1:0")
    at = replace(AT, writer="", closed=True, holder=Holder("last", 5, process))
    with pytest.raises(Refused, match=r"'last' \(host host, process 7\) took over") as raised:
        admit_step(step(session=SessionRef("run", 2, 4)), at)
    assert raised.value.metadata == {
        "epoch": "5", "session_epoch": "4", "writer": "last", "writer_host": "host",
        "writer_process_id": "7", "writer_start_time_ticks": "123", "writer_boot_id": "boot",
        "writer_pid_namespace": "pid:[1]", "writer_job": "slurm:1:0",
    }  # fmt: skip
