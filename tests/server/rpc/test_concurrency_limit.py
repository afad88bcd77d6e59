"""Calls over a concurrency limit are refused, and a finished call makes room for the next."""

from __future__ import annotations

import pytest

from maskwire_server.errors import Refused
from maskwire_server.rpc.concurrency_limit import ConcurrencyLimit, PacedCalls


def test_a_call_over_the_limit_is_refused_with_the_limit() -> None:
    limit = ConcurrencyLimit(2, "downloads")
    with limit, limit:
        with (
            pytest.raises(Refused, match="the limit of 2 downloads at a time is reached; retry") as raised,
            limit,
        ):
            pytest.fail("the third call was admitted")
        assert (raised.value.reason, raised.value.metadata) == ("QUEUE_FULL", {"queue_limit": "2"})
        with pytest.raises(Refused), limit:
            pytest.fail("the refusal released a slot that it did not have")


def test_a_call_that_ends_with_an_error_makes_room_for_the_next() -> None:
    limit = ConcurrencyLimit(1, "downloads")
    with pytest.raises(ValueError, match="broken"), limit:
        raise ValueError("broken")
    with limit:
        pass


def test_calls_that_take_calls_take_half_of_the_time_at_most() -> None:
    now, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    calls = PacedCalls(lambda: now[0], sleep)
    for seconds, idle in ((3.0, 0.0), (1.0, 0.0), (2.0, 0.5), (1.0, 10.0)):
        now[0] += idle
        with calls as turn:
            now[0] += seconds
            turn.took(seconds)
    assert pauses == [0.0, 3.0, 0.5, 0.0], (
        "after 3 s, after 1 s less the idle time, and after a long idle time"
    )


def test_what_a_call_waited_for_the_mirror_delays_no_other_call() -> None:
    now, pauses = [100.0], []
    calls = PacedCalls(lambda: now[0], pauses.append)
    for held_back in (40.0, 0.0):
        with calls as turn:
            now[0] += 0.25 + held_back
            turn.took(0.25)
    assert pauses == [0.0, 0.25]


def test_the_next_call_runs_after_one_that_failed() -> None:
    calls = PacedCalls()
    with pytest.raises(ValueError, match="broken"), calls:
        raise ValueError("broken")
    with calls:
        pass
