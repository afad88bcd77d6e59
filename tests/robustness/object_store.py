"""A real S3 server in a process of its own, and a proxy that fails its clients as networks and stores do."""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen

BUCKET = "runs"
FAULTS = ("error before", "error after", "cut", "reset", "lost", "slow", "twice", "refused", "expired")
_EXPIRED = (
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message>'
    b"</Error>"
)
_BROKEN = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>Try again.</Message></Error>'


def environment(endpoint: str) -> dict[str, str]:
    """What a server needs to find the store."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


class ObjectStoreServer:
    """moto's S3 server; `with` ends it."""

    def __enter__(self) -> ObjectStoreServer:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment("")},
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(Request(f"{self.endpoint}/{BUCKET}", method="PUT"), timeout=5).close()
                return self
            except OSError:
                assert time.monotonic() < deadline, "the S3 server did not start"
                assert self._process.poll() is None, "the S3 server ended"
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


class Proxy(ThreadingHTTPServer):
    """Passes requests on, and does one of FAULTS to some of them; `with` ends it."""

    daemon_threads = True

    def __init__(self, port: int, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.port = port
        self.share = 0.0
        """Which share of the requests meets a fault."""
        self.fault = ""
        """The fault that all requests meet; empty: none."""
        self.done: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._lock = threading.Lock()

    def next_fault(self) -> str:
        """The fault of the next request, or ""."""
        with self._lock:
            fault = self.fault
            if not fault and self._draw.random() < self.share:
                fault = self._draw.choice(FAULTS)
            if fault:
                self.done[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        fault = self.server.next_fault()
        length = int(self.headers.get("Content-Length") or 0)
        if fault in ("reset", "refused"):
            return self._hang_up()
        if fault == "cut":
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self.rfile.read(length)
        if fault == "slow":
            time.sleep(0.2)
        if fault == "error before":
            return self._answer(500, _BROKEN % b"InternalError", {})
        if fault == "expired":
            return self._answer(403, _EXPIRED, {})
        status, data, headers = self._forward(body)
        if fault == "twice":
            status, data, headers = self._forward(body)
        if fault == "lost":
            return self._hang_up()
        if fault == "error after":
            return self._answer(503, _BROKEN % b"SlowDown", {})
        return self._answer(status, data, headers)

    def _forward(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            kept = {
                name: value for name, value in self.headers.items()
                if name.lower() not in ("expect", "connection")
            }  # fmt: skip
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815
