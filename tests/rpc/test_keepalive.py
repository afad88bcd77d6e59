"""Client and server notice that the other side has vanished without closing its connection."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from serving import WAIT

from maskwire import credentials
from maskwire.credentials import Endpoint
from maskwire_server.rpc import server

PING, ACK, PREFACE, HEADER = 6, 1, 24, 9  # RFC 9113
INTERVAL_DIVISOR = 60  # of the intervals between pings; gRPC sends one per second at most
TIMEOUT_DIVISOR = 5  # of the timeouts: 4 s are enough on a busy machine


def shortened(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The options with intervals and timeouts that a test can wait for."""

    def divisor(name: str) -> int:
        if not name.endswith("_ms"):
            return 1
        return TIMEOUT_DIVISOR if "timeout" in name else INTERVAL_DIVISOR

    return [(name, value // divisor(name)) for name, value in options]


def take_pings(received: bytearray) -> int:
    """Remove the complete HTTP/2 frames from the received bytes; return how many of them were pings."""
    count = 0
    while len(received) >= (size := HEADER + int.from_bytes(received[:3], "big")):
        count += received[3] == PING and not received[4] & ACK
        del received[:size]
    return count


class BlackHole:
    """A TCP proxy that counts the pings of each side, and forwards nothing once `closed` is set."""

    def __init__(self, port: int) -> None:
        self.pings: Counter[str] = Counter()
        self.closed = threading.Event()
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        upstream = socket.create_connection(("127.0.0.1", self._port))
        self._sockets += client, upstream
        preface = client.recv(PREFACE, socket.MSG_WAITALL)
        upstream.sendall(preface)
        for arguments in ((client, upstream, "client"), (upstream, client, "server")):
            threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        received = bytearray()
        with contextlib.suppress(OSError):  # one side has closed its connection
            while data := source.recv(2**16):
                if not self.closed.is_set():
                    sink.sendall(data)
                    received += data
                    self.pings[name] += take_pings(received)

    def close(self) -> None:
        for each in self._sockets:
            each.close()


class Held(grpc.GenericRpcHandler):  # type: ignore[misc]
    """One method, whose calls last until the test ends."""

    def __init__(self) -> None:
        self.cancelled, self.ended = threading.Event(), threading.Event()

    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._wait)

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.add_callback(self.cancelled.set)
        self.ended.wait()
        return request


@pytest.fixture
def held() -> Iterator[tuple[Held, int]]:
    handler = Held()
    serving = grpc.server(futures.ThreadPoolExecutor(1), [handler], options=shortened(server._KEEPALIVE))
    port = serving.add_insecure_port("127.0.0.1:0")
    serving.start()
    yield handler, port
    handler.ended.set()
    serving.stop(0).wait()


def test_a_long_call_ends_on_both_sides_when_the_other_side_vanishes(
    held: tuple[Held, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default gRPC gives up after two pings without data: the call would wait until its deadline."""
    handler, port = held
    monkeypatch.setattr(credentials, "_CHANNEL_OPTIONS", shortened(credentials._CHANNEL_OPTIONS))
    hole = BlackHole(port)
    with Endpoint.of(hole.target).channel() as channel:
        call = channel.unary_unary("/any/method").future(b"", timeout=10 * WAIT)
        deadline = time.monotonic() + WAIT
        while (
            min(hole.pings["client"], hole.pings["server"]) < 6
        ):  # a server that forbids pings refuses the third
            assert time.monotonic() < deadline, f"no more pings after {dict(hole.pings)}"
            time.sleep(0.05)
        assert not call.done(), "pings are allowed, however many"
        hole.closed.set()
        error = call.exception(WAIT)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert handler.cancelled.wait(WAIT), "the server noticed nothing"
    hole.close()
