"""Calls over a concurrency limit are refused, and a finished call makes room for the next."""

from __future__ import annotations

import pytest

from maskwire_server.errors import Refused
from maskwire_server.rpc.concurrency_limit import ConcurrencyLimit


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
