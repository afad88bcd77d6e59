"""A side that vanishes without closing its connection, as after a loss of power, is noticed by the other."""

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
FASTER = 60  # pings come so many times as often; gRPC sends one a second at most
SOONER = 5  # answers are due so many times as soon: 4 s are enough on a busy machine


def faster(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    factors = {name: SOONER if "timeout" in name else FASTER for name, _ in options if name.endswith("_ms")}
    return [(name, value // factors.get(name, 1)) for name, value in options]


class BlackHole:
    """A TCP proxy that counts the pings of each side, and can stop passing bytes on."""

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
        for source, sink, name, skip in (
            (client, upstream, "client", PREFACE),
            (upstream, client, "server", 0),
        ):
            threading.Thread(target=self._pass_on, args=(source, sink, name, skip), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, name: str, skip: int) -> None:
        pending = bytearray()
        with contextlib.suppress(OSError):  # one side has closed its connection
            while data := source.recv(2**16):
                if self.closed.is_set():
                    continue
                sink.sendall(data)
                pending += data
                if skip and len(pending) >= skip:
                    del pending[:skip]
                    skip = 0
                while not skip and len(pending) >= HEADER:
                    size = HEADER + int.from_bytes(pending[:3], "big")
                    if len(pending) < size:
                        break
                    self.pings[name] += pending[3] == PING and not pending[4] & ACK
                    del pending[:size]

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
    serving = grpc.server(futures.ThreadPoolExecutor(1), [handler], options=faster(server._KEEPALIVE))
    port = serving.add_insecure_port("127.0.0.1:0")
    serving.start()
    yield handler, port
    handler.ended.set()
    serving.stop(0).wait()


def test_a_long_call_ends_on_both_sides_when_nothing_arrives_any_more(
    held: tuple[Held, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default gRPC gives up after two pings without data: the call would wait until its deadline."""
    handler, port = held
    monkeypatch.setattr(credentials, "_CHANNEL_OPTIONS", faster(credentials._CHANNEL_OPTIONS))
    hole = BlackHole(port)
    with Endpoint.of(hole.target).channel() as channel:
        call = channel.unary_unary("/any/method").future(b"", timeout=10 * WAIT)
        deadline = time.monotonic() + WAIT
        while min(hole.pings["client"], hole.pings["server"]) < 6:  # the third that is too early is refused
            assert time.monotonic() < deadline, f"no more pings after {dict(hole.pings)}"
            time.sleep(0.05)
        assert not call.done(), "pings are allowed, however many"
        hole.closed.set()
        error = call.exception(WAIT)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert handler.cancelled.wait(WAIT), "the server noticed nothing"
    hole.close()
