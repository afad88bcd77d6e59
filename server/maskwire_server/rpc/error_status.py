"""Ends calls with an error, sent as a google.rpc.Status with details."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from maskwire_server.errors import REASONS, Refused, shortage

log = logging.getLogger(__name__)

DOMAIN = "maskwire"
_MAX_CHARACTERS = 1000
"""The longest message or value, which may quote a request: the status must fit into an HTTP/2 header."""


@contextmanager
def abort_on_error(context: grpc.ServicerContext) -> Iterator[None]:
    """A context manager that ends the call with an error status if its body raises an exception."""
    try:
        yield
    except Refused as refusal:
        abort(context, refusal)
    except CancelledError:
        abort(context, _cancelled(context))
    except Exception as error:
        abort(context, shortage(error) or _internal())


def abort(context: grpc.ServicerContext, refusal: Refused) -> NoReturn:
    """End the call with the error status of a refusal. Never returns."""
    context.abort_with_status(rpc_status.to_status(to_status(refusal)))
    raise AssertionError("abort_with_status must raise an exception, but it returned")


def to_status(refusal: Refused) -> Any:
    """Convert a refusal to a google.rpc.Status with ErrorInfo and, if needed, BadRequest and RetryInfo."""
    code = code_pb2.Code.Value(REASONS[refusal.reason].status)
    status = status_pb2.Status(code=code, message=_shorten(refusal.message))
    metadata = {name: _shorten(value) for name, value in refusal.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if refusal.fields:
        bad = error_details_pb2.BadRequest()
        for field, description in refusal.fields.items():
            bad.field_violations.add(field=field, description=_shorten(description))
        status.details.add().Pack(bad)
    if refusal.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(refusal.retry_after_seconds * 1000))
        status.details.add().Pack(retry)
    return status


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def _cancelled(context: grpc.ServicerContext) -> Refused:
    """The refusal that ends a call that its deadline or its client cancelled."""
    seconds_left = context.time_remaining()
    if seconds_left is not None and seconds_left <= 0:
        return Refused(
            "DEADLINE_EXCEEDED",
            "the call's deadline passed before the answer was ready; a step may have been applied or not: "
            "retry with the same request id",
        )
    return Refused("CANCELLED", "the client cancelled the call or disconnected")


def _internal() -> Refused:
    """Log the current exception. The refusal has only its id, because its text may contain private data."""
    error_id = uuid.uuid4().hex[:12]
    log.exception("unexpected error %s", error_id)
    return Refused(
        "INTERNAL", f"unexpected error; look up error {error_id} in the server's log", error_id=error_id
    )
