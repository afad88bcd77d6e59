"""The gRPC options by which client and server notice that the other side has vanished."""

from __future__ import annotations

KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    # The time that the other side's TCP has to acknowledge data (gRFC A18).
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # for the answer to a ping; by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    # 0: no limit. By default, gRPC stops after two pings without data, and a long call would wait forever.
    ("grpc.http2.max_pings_without_data", 0),
]
"""Each side pings the other after 30 s without data. If no answer comes within 20 s, it closes the
connection, and the calls in progress end with UNAVAILABLE."""
