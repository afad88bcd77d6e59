"""Pages of checkpoints while others are saved and deleted between two requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.errors import Refused
from maskwire_server.results import CheckpointInfo
from maskwire_server.rpc import list_checkpoints


def engine_with(*names: str) -> Any:
    infos = [CheckpointInfo(name, 1, 1, bytes(32), (), 0.0) for name in names]
    return SimpleNamespace(checkpoints=lambda: infos)


def page(engine: Any, size: int = 0, token: str = "") -> tuple[list[str], str]:
    answer = list_checkpoints.answer(pb.ListCheckpointsRequest(page_size=size, page_token=token), engine)
    return [info.name for info in answer.checkpoints], answer.next_page_token


def test_pages_follow_one_another_until_the_last_which_has_no_token() -> None:
    engine = engine_with("e", "d", "c", "b", "a")
    first, token = page(engine, 2)
    second, next_token = page(engine, 2, token)
    third, end = page(engine, 2, next_token)
    assert (first, second, third, end) == (["e", "d"], ["c", "b"], ["a"], "")
    assert page(engine, 5) == (["e", "d", "c", "b", "a"], ""), "a full page may be the last"
    assert page(engine_with()) == ([], "")


def test_a_page_continues_after_the_same_checkpoint_when_others_were_saved_or_deleted() -> None:
    _, token = page(engine_with("d", "c", "b", "a"), 2)
    assert page(engine_with("new", "c", "b", "a"), 2, token) == (["b", "a"], "")


def test_pages_have_50_checkpoints_by_default_and_at_most_1000() -> None:
    engine = engine_with(*(f"n{number}" for number in range(1001)))
    assert len(page(engine)[0]) == 50
    assert len(page(engine, 5000)[0]) == 1000


@pytest.mark.parametrize(
    "token", ["é", "x", "####", "Z29uZQ=="], ids=["not ASCII", "cut", "no base64", "gone"]
)
def test_a_token_that_is_unknown_or_whose_checkpoint_is_gone_is_refused(token: str) -> None:
    with pytest.raises(Refused, match="request the first page, without a token") as raised:
        page(engine_with("b", "a"), 1, token)
    assert (raised.value.reason, raised.value.metadata["field"]) == ("INVALID_FIELD", "page_token")


def test_a_negative_page_size_is_refused_before_the_engine_is_called() -> None:
    with pytest.raises(Refused, match="page_size must be at least 0, got -1"):
        page(None, -1)
