"""Publishes an event at the end of each call, with its method, status code, reason and duration."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.call_context import CallContext, current
from maskwire_server.errors import REASONS, Refused
from maskwire_server.events import OTHER_METHOD, CallEnded, Event

Publish = Callable[[Event], None]

_METHODS = {method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods}
_STATUS_DETAILS = "grpc-status-details-bin"
_TRACE = "traceparent"
_TRACE_LENGTH = 55
_MAX_ID = 128

_numbers = itertools.count(1)


def observed(
    method: Callable[..., Any], name: str, publish: Publish, *, streams: bool
) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Wrap a method of the service so that an event is published at the end of each call.

    While a unary method runs, `call_context.current` holds its call.
    """

    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        call, began = _call(request), time.monotonic()
        token = current.set(call)
        try:
            response = method(request, context)
        except BaseException:
            publish(_refused(name, call, began, context))
            raise
        finally:
            current.reset(token)
        publish(_ended(name, "OK", "", call, began, context))
        return response

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        call, began, finished = _call(request), time.monotonic(), False
        try:
            for response in method(request, context):
                finished = getattr(response, "done", False)
                yield response
        except GeneratorExit:  # the client disconnected, perhaps after the last response
            code = "OK" if finished else "CANCELLED"
            publish(_ended(name, code, "" if finished else code, call, began, context))
            raise
        except BaseException:
            publish(_refused(name, call, began, context))
            raise
        publish(_ended(name, "OK", "", call, began, context))

    chosen: Any = stream if streams else unary
    pool = getattr(method, "experimental_thread_pool", None)
    if pool is not None:
        chosen.experimental_thread_pool = pool
    return chosen  # type: ignore[no-any-return]


def rejected(method: str, refusal: Refused) -> CallEnded:
    """The event for the end of a call that was rejected before its request was read."""
    service, _, name = method.rpartition("/")
    known = name in _METHODS and service.endswith("TrainingService")
    return CallEnded(
        time.time(), name if known else OTHER_METHOD, REASONS[refusal.reason].status, refusal.reason, 0.0
    )


def _call(request: Any) -> CallContext:
    sent = getattr(request, "request_id", "")
    valid = len(sent) <= _MAX_ID and sent.isprintable()  # the request is not validated yet
    return CallContext(next(_numbers), sent if valid else "")


def _refused(name: str, call: CallContext, began: float, context: Any) -> CallEnded:
    """The event for the end of a call whose error status the handler has set."""
    code = context.code() or grpc.StatusCode.UNKNOWN
    return _ended(name, code.name, _reason(context), call, began, context)


def _reason(context: Any) -> str:
    """The reason in the call's status details; empty if they contain none."""
    for key, value in context.trailing_metadata() or ():
        if key == _STATUS_DETAILS:
            info = error_details_pb2.ErrorInfo()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


def _ended(name: str, code: str, reason: str, call: CallContext, began: float, context: Any) -> CallEnded:
    trace = next((value for key, value in context.invocation_metadata() or () if key == _TRACE), "")
    return CallEnded(
        time.time(),
        name,
        code,
        reason,
        time.monotonic() - began,
        call.request_id,
        call.number,
        trace if isinstance(trace, str) and len(trace) == _TRACE_LENGTH else "",
    )
