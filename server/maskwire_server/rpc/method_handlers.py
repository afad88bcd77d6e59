"""gRPC handlers for the service's methods. They refuse a request whose bytes cannot be parsed.

grpcio 1.85.1 leaks about 8 KiB and logs a traceback for each request whose deserializer raises. These
deserializers never raise: they return a marker, and the handler refuses the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.errors import Refused
from maskwire_server.rpc.call_events import Publish, observed
from maskwire_server.rpc.error_status import abort

_UNREADABLE = b"unreadable"  # not None, which gRPC treats as a failed deserializer
_SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"]


def handler(servicer: object, publish: Publish) -> grpc.GenericRpcHandler:
    """A handler for all methods of the service: it calls the servicer, and publishes the end of each call."""
    methods = {}
    for method in _SERVICE.methods:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        method_handler = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        methods[method.name] = method_handler(
            observed(
                _refuse_unreadable(getattr(servicer, method.name), method.input_type.full_name),
                method.name,
                publish,
                streams=method.server_streaming,
            ),
            request_deserializer=_deserializer(request),
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, methods)


def _deserializer(kind: type[Message]) -> Callable[[bytes], Message | bytes]:
    def deserialize(data: bytes) -> Message | bytes:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _UNREADABLE

    return deserialize


def _refuse_unreadable(method: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
    def handle(request: Message | bytes, context: grpc.ServicerContext) -> Any:
        if request is _UNREADABLE:
            message = f"the request must be a {name}, but its bytes cannot be parsed; use the service's proto"
            abort(context, Refused("INVALID_FIELD", message))
        return method(request, context)

    pool = getattr(method, "experimental_thread_pool", None)
    if pool is not None:
        handle.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return handle
