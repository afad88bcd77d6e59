"""A proxy between client and server that loses, repeats, delays and cuts what passes.

Calls pass a gRPC proxy, which knows where one call ends: it drops a request before or after the server got
it, sends it twice, holds it back so that a later one overtakes it, or never answers. In front of it a TCP
proxy resets connections in the middle of whatever they carry.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

CALL_FAULTS = ("drop before", "drop after", "duplicate", "reorder", "stall")
_LINGER_NOT = struct.pack("ii", 1, 0)  # close() sends a reset


class CallProxy:
    """Forwards every call of the service; `faults` are done to the next TrainSteps, one each."""

    def __init__(self, target: str, seed: int) -> None:
        self._channel = grpc.insecure_channel(target)
        self._random = random.Random(seed)
        self._faults: deque[str] = deque()
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self._server = grpc.server(ThreadPoolExecutor(32))
        self._server.add_generic_rpc_handlers((_Forward(self),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def add(self, fault: str) -> None:
        """Do this to the next TrainStep that has none yet."""
        with self._lock:
            self._faults.append(fault)

    def forward(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        """One call."""
        fault = ""
        if method.endswith("/TrainStep"):
            with self._lock:
                fault = self._faults.popleft() if self._faults else ""
                self.done[fault] += bool(fault)
        if fault == "drop before":
            context.abort(grpc.StatusCode.UNAVAILABLE, "dropped on the way there")
        if fault == "reorder":
            time.sleep(self._random.random() * 0.05)
        call: Any = self._channel.unary_unary(method)
        timeout = context.time_remaining()
        if fault == "duplicate":
            twins = [call.future(request, timeout=timeout) for _ in range(2)]
            self._random.shuffle(twins)
            answers = [self._result(twin, context) for twin in twins]
            return answers[0]
        answer = self._result(call.future(request, timeout=timeout), context)
        if fault == "drop after":
            context.abort(grpc.StatusCode.UNAVAILABLE, "dropped on the way back")
        if fault == "stall":
            while context.is_active():
                time.sleep(0.02)
        return answer

    def _result(self, future: Any, context: grpc.ServicerContext) -> bytes:
        try:
            answer: bytes = future.result()
        except grpc.RpcError as error:
            failed: Any = error
            context.set_trailing_metadata(failed.trailing_metadata() or ())
            context.abort(failed.code(), failed.details() or "")
            raise
        return answer

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()


class _Forward(grpc.GenericRpcHandler):
    def __init__(self, proxy: CallProxy) -> None:
        self._proxy = proxy

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = details.method
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._proxy.forward(method, request, context)
        )


class TcpProxy:
    """Forwards bytes to a port of this machine, and resets its connections when told."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                pair = near, far
                self._pairs.add(pair)
                for source, sink in (pair, pair[::-1]):
                    threading.Thread(target=self._pump, args=(source, sink, pair), daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def reset(self) -> None:
        """Cut every connection, as a middlebox that forgot them would."""
        for near, far in list(self._pairs):
            for end in (near, far):
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.reset()
