"""The rules of OpenSession, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maskwire.v1.values import RunState
from maskwire_server.engine.admission_rules import Situation
from maskwire_server.engine.session_rules import SessionFacts, admit_session
from maskwire_server.errors import Refused
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SessionRequest

HASH, OTHER = b"a" * 32, b"b" * 32
AT = Situation(RunState.SERVING, "run", 2, 5, "me", closed=False, next_step=10, window=4)


def opening(at: Situation = AT, **changes: Any) -> bool | str:
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


@pytest.mark.parametrize("given", [(4, None), (None, 4)])
def test_a_fenced_client_is_told_its_epoch_and_the_newest(given: tuple[int | None, int | None]) -> None:
    nonce_epoch, held_epoch = given
    facts = SessionFacts(SessionRequest("me", "n", held_epoch=held_epoch), nonce_epoch, 9, None)
    with pytest.raises(Refused, match=r"epoch 4 was superseded: 'me' took over \(epoch 5\)"):
        admit_session(facts, AT)


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
