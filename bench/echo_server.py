"""A bare grpcio server that answers each request with 100 bytes. python -m bench.echo_server."""

from __future__ import annotations

from concurrent import futures

import grpc


def main() -> None:
    """Serve until killed."""
    handler = grpc.method_handlers_generic_handler(
        "bench.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(lambda _request, _context: bytes(100))}
    )
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    print(f"listening on 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
