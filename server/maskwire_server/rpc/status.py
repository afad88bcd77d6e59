"""A refusal on the wire: google.rpc.Status with its details."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from maskwire_server.errors import Refused

DOMAIN = "maskwire"
_LONGEST = 1000
"""Characters of a message or value: what a client sent and reads back must fit into an HTTP/2 header."""


def abort(context: grpc.ServicerContext, refusal: Refused) -> NoReturn:
    """End the call with the refusal."""
    context.abort_with_status(rpc_status.to_status(to_status(refusal)))
    raise AssertionError("abort_with_status raises")


def to_status(refusal: Refused) -> Any:
    """A refusal as google.rpc.Status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    kind = refusal.kind
    status = status_pb2.Status(code=code_pb2.Code.Value(kind.status), message=_short(refusal.message))
    metadata = {name: _short(value) for name, value in refusal.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if refusal.fields:
        bad = error_details_pb2.BadRequest()
        for field, description in refusal.fields.items():
            bad.field_violations.add(field=field, description=_short(description))
        status.details.add().Pack(bad)
    if kind.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(kind.retry_after_seconds * 1000))
        status.details.add().Pack(retry)
    return status


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
