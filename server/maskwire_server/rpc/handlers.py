"""The service's methods for gRPC, with requests that are no protobuf message refused like any other.

grpcio 1.85.1 leaks about 8 KiB, and logs a traceback, for each request whose deserializer raises; so that
none does, bytes that cannot be read become a refusal in the handler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.errors import Refused
from maskwire_server.rpc.status import abort

_UNREADABLE = b"unreadable"  # not None, which gRPC takes for a failure of its own
_SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"]


def handler(servicer: object) -> grpc.GenericRpcHandler:
    """Every method of the service, as the servicer does it."""
    methods = {}
    for method in _SERVICE.methods:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        kind = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        methods[method.name] = kind(
            _readable(getattr(servicer, method.name), method.input_type.full_name),
            request_deserializer=_reader(request),
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, methods)


def _reader(kind: type[Message]) -> Callable[[bytes], Message | bytes]:
    def read(data: bytes) -> Message | bytes:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _UNREADABLE

    return read


def _readable(behavior: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
    def behave(request: Message | bytes, context: grpc.ServicerContext) -> Any:
        if request is _UNREADABLE:
            abort(context, Refused("INVALID_FIELD", f"the request must be a {name}, these bytes are none"))
        return behavior(request, context)

    pool = getattr(behavior, "experimental_thread_pool", None)
    if pool is not None:
        behave.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return behave
