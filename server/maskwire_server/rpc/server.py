"""The gRPC server: ports, threads, limits, health and reflection."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.keepalive import KEEPALIVE_OPTIONS
from maskwire.v1.values import RunState
from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.rpc import auth, method_handlers, unix_socket
from maskwire_server.rpc.call_events import Publish
from maskwire_server.rpc.credential_files import CredentialFiles
from maskwire_server.rpc.engine_interface import EngineInterface
from maskwire_server.rpc.service import TrainingService

SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"].full_name
LIVENESS = "liveness"
_KEEPALIVE = [*KEEPALIVE_OPTIONS, ("grpc.http2.min_ping_interval_without_data_ms", 15_000)]
"""Clients may ping every 15 s, also while no call is in progress."""
_EXTRA_WORKERS = 16  # so that a worker is free to refuse calls when the queue is full


class Server:
    """Serves one engine on an address, and also on a Unix socket if one is configured."""

    def __init__(
        self, engine: EngineInterface, config: ServeConfig, publish: Publish = lambda _: None
    ) -> None:
        """`publish` receives an event at the end of each call. Raises ConfigError for invalid credentials."""
        self._config = config
        self._publish = publish
        self._files = CredentialFiles(config, publish=publish)
        self._credentials = self._files.server_credentials()
        interceptor = self._files.interceptor
        # Health and status have threads of their own: they must answer even if every worker is waiting.
        self._health_pool = ThreadPoolExecutor(2, thread_name_prefix="maskwire-health")
        self._reflection_pool = ThreadPoolExecutor(4, thread_name_prefix="maskwire-reflection")
        self._workers = ThreadPoolExecutor(
            2 * config.queue_limit + config.window + _EXTRA_WORKERS, thread_name_prefix="maskwire-rpc"
        )
        self._health = health.HealthServicer(experimental_thread_pool=self._health_pool)
        for name, serving in (("", False), (SERVICE, False), (LIVENESS, True)):
            self._set_health(name, serving)
        self._assign_pool(self._health, "Check", self._health_pool)
        self._service = TrainingService(engine, partial(auth.caller, has_tokens=config.has_tokens))
        self._assign_pool(self._service, "GetStatus", self._health_pool)
        self._server = self._create([] if interceptor is None else [interceptor])
        self._socket: unix_socket.UnixSocket | None = None
        self._socket_server: grpc.Server | None = None
        path = config.address.removeprefix("unix:") if config.address.startswith("unix:") else config.socket
        if path is not None:
            self._socket = unix_socket.UnixSocket(Path(path))
            # The socket needs no token. An interceptor cannot tell where a call comes from: use two servers.
            self._socket_server = self._create([])

    def _create(self, interceptors: list[grpc.ServerInterceptor]) -> grpc.Server:
        server = grpc.server(
            self._workers,
            interceptors=interceptors,
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail instead of sharing it
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                *_KEEPALIVE,
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        server.add_generic_rpc_handlers((method_handlers.handler(self._service, self._publish),))
        if self._config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            servicer = reflection.ReflectionServicer(names)
            # A client may keep a reflection stream open indefinitely: the stream must not occupy a worker.
            self._assign_pool(servicer, "ServerReflectionInfo", self._reflection_pool)
            add = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            add(servicer, server)  # type: ignore[no-untyped-call]
        return server

    @staticmethod
    def _assign_pool(servicer: object, method: str, pool: ThreadPoolExecutor) -> None:
        """Run a method of the servicer on the threads of `pool`."""
        original: Callable[[Any, Any], Any] = getattr(servicer, method)

        def on_pool(request: Any, context: Any) -> Any:
            return original(request, context)

        on_pool.experimental_thread_pool = pool  # type: ignore[attr-defined]
        setattr(servicer, method, on_pool)

    def start(self) -> str:
        """Start listening, and return the address with the actual port. Raises ConfigError."""
        if self._socket is not None and self._socket_server is not None:
            self._socket.bind(self._socket_server)
            self._socket_server.start()
        address = self._config.address
        if address.startswith("unix:"):
            return address
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(
                f"serve.address: cannot listen on {address!r}: the port is taken, or the host is not an "
                "address of this machine; choose another address, or port 0 for a free port"
            )
        self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    def refresh_credentials(self, *, now: bool = False) -> None:
        """Read changed certificate and token files, at most once per minute; with `now`, read all at once."""
        self._files.refresh(now=now)

    def on_state(self, state: RunState) -> None:
        """Update the health status: ready while the state is SERVING, live unless recovery has failed."""
        for name in ("", SERVICE):
            self._set_health(name, state is RunState.SERVING)
        self._set_health(LIVENESS, state is not RunState.RECOVERY_FAILED)

    def on_hang(self) -> None:
        """Report the hung process as neither ready nor live. It is about to exit."""
        for name in ("", SERVICE, LIVENESS):
            self._set_health(name, False)

    def _set_health(self, name: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def stop(self, grace: float) -> None:
        """Reject new calls, give running ones `grace` seconds to finish, and end the threads."""
        servers = (self._server, self._socket_server)
        stopping = [server.stop(grace) for server in servers if server is not None]
        for stopped in stopping:
            stopped.wait()
        if self._socket is not None:
            self._socket.remove()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._reflection_pool.shutdown(wait=False, cancel_futures=True)
        self._health_pool.shutdown(wait=False, cancel_futures=True)
