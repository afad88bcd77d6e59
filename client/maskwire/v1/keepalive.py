"""The gRPC options with which client and server notice that the other side has vanished."""

from __future__ import annotations

KEEPALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    (
        "grpc.http2.ping_timeout_ms",
        20_000,
    ),  # since gRPC 1.60, by default a minute, and the timeout that counts
    ("grpc.keepalive_permit_without_calls", 1),
    # 0: no limit. By default, gRPC stops after two pings without data, and a long call waits forever.
    ("grpc.http2.max_pings_without_data", 0),
]
"""Each side pings the other after 30 s without data. If no answer comes within 20 s, the other side has
vanished, and the calls between the two end with UNAVAILABLE."""
