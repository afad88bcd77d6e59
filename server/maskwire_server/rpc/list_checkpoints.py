"""Answers ListCheckpoints with pages of a list that may change between two requests."""

from __future__ import annotations

import base64

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.errors import invalid_field
from maskwire_server.results import CheckpointInfo
from maskwire_server.rpc import encoding
from maskwire_server.rpc.engine_interface import EngineInterface

_DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE = 50, 1000


def answer(request: pb.ListCheckpointsRequest, engine: EngineInterface) -> pb.ListCheckpointsResponse:
    """Answer a request with one page of the engine's checkpoints. Raises Refused."""
    if request.page_size < 0:
        raise invalid_field("page_size", f"page_size must be at least 0, got {request.page_size}")
    size = min(request.page_size or _DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE)
    checkpoints = engine.checkpoints()
    start = _start(request.page_token, checkpoints)
    page = checkpoints[start : start + size]
    more = start + size < len(checkpoints)
    return pb.ListCheckpointsResponse(
        checkpoints=[encoding.checkpoint(info) for info in page],
        next_page_token=_token(page[-1]) if more else "",
    )


def _token(last: CheckpointInfo) -> str:
    """The token of the next page: the encoded name of a page's last checkpoint.

    Unlike an index, a name stays valid when other checkpoints are saved or deleted.
    """
    return base64.urlsafe_b64encode(last.name.encode()).decode()


def _start(token: str, checkpoints: list[CheckpointInfo]) -> int:
    """The index of the first checkpoint of the page with this token. Raises Refused."""
    if not token:
        return 0
    try:
        last = base64.urlsafe_b64decode(token.encode()).decode()
        return [info.name for info in checkpoints].index(last) + 1
    except ValueError:  # not a token, or its checkpoint has been deleted
        raise invalid_field(
            "page_token",
            f"page_token must come from an earlier page, got {token[:80]!r}: the token is unknown, or its "
            "checkpoint was deleted; request the first page, without a token",
        ) from None
