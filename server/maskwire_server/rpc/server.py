"""The gRPC server around the service: ports, limits, health and reflection."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from maskwire.v1 import training_service_pb2 as pb
from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.results import RunState
from maskwire_server.rpc import auth, handlers, unix_socket
from maskwire_server.rpc.engine_interface import EngineInterface
from maskwire_server.rpc.service import TrainingService

SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"].full_name
LIVENESS = "liveness"
_SPARE_WORKERS = 16  # beside one for each request that may wait, so that a full queue can say so


class Server:
    """Listens on one address, and maybe on a Unix socket beside it, for one engine."""

    def __init__(self, engine: EngineInterface, config: ServeConfig) -> None:
        self._config = config
        self._credentials = auth.server_credentials(config)
        gate = auth.gate(config)
        # Health and status have threads of their own: they must answer when every worker waits.
        self._prompt_pool = ThreadPoolExecutor(2, thread_name_prefix="maskwire-health")
        self._reflection_pool = ThreadPoolExecutor(4, thread_name_prefix="maskwire-reflection")
        self._workers = ThreadPoolExecutor(
            config.queue_limit + config.window + _SPARE_WORKERS, thread_name_prefix="maskwire-rpc"
        )
        self._health = health.HealthServicer(experimental_thread_pool=self._prompt_pool)
        for name, serving in (("", False), (SERVICE, False), (LIVENESS, True)):
            self._set_health(name, serving)
        self._on_pool(self._health, "Check", self._prompt_pool)
        self._service = TrainingService(engine)
        self._on_pool(self._service, "GetStatus", self._prompt_pool)
        self._door = self._make_door([] if gate is None else [gate])
        self._socket: unix_socket.Socket | None = None
        self._side_door: grpc.Server | None = None
        path = config.address.removeprefix("unix:") if config.address.startswith("unix:") else config.socket
        if path is not None:
            self._socket = unix_socket.Socket(Path(path))
            # A gate cannot see where a call comes from, so the socket has a server of its own.
            self._side_door = self._make_door([])

    def _make_door(self, interceptors: list[grpc.ServerInterceptor]) -> grpc.Server:
        door = grpc.server(
            self._workers,
            interceptors=interceptors,
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Clients may ping every 15 s, also while nothing is under way.
                ("grpc.http2.min_ping_interval_without_data_ms", 15_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 15_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, door)
        door.add_generic_rpc_handlers((handlers.handler(self._service),))
        if self._config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            servicer = reflection.ReflectionServicer(names)
            # Its streams stay open as long as a client likes: they hold nobody else's workers.
            self._on_pool(servicer, "ServerReflectionInfo", self._reflection_pool)
            add = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            add(servicer, door)  # type: ignore[no-untyped-call]
        return door

    @staticmethod
    def _on_pool(servicer: object, method: str, pool: ThreadPoolExecutor) -> None:
        """Give a method threads of its own."""
        behave: Callable[[Any, Any], Any] = getattr(servicer, method)

        def on_pool(request: Any, context: Any) -> Any:
            return behave(request, context)

        on_pool.experimental_thread_pool = pool  # type: ignore[attr-defined]
        setattr(servicer, method, on_pool)

    def start(self) -> str:
        """Listen, and return the address, with the port that was found. Raises ConfigError."""
        if self._socket is not None and self._side_door is not None:
            self._socket.bind(self._side_door)
            self._side_door.start()
        address = self._config.address
        if address.startswith("unix:"):
            return address
        try:
            if self._credentials is None:
                port = self._door.add_insecure_port(address)
            else:
                port = self._door.add_secure_port(address, self._credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(
                f"serve.address: cannot listen on {address!r}: the port is taken or the host is not this "
                "machine's; choose another, or port 0 for a free one"
            )
        self._door.start()
        return f"{address.rpartition(':')[0]}:{port}"

    def on_state(self, state: RunState) -> None:
        """Readiness follows the state; liveness ends only with a failed recovery."""
        for name in ("", SERVICE):
            self._set_health(name, state is RunState.SERVING)
        self._set_health(LIVENESS, state is not RunState.RECOVERY_FAILED)

    def _set_health(self, name: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones `grace` seconds, and end the threads."""
        stopping = [door.stop(grace) for door in (self._door, self._side_door) if door is not None]
        for stopped in stopping:
            stopped.wait()
        if self._socket is not None:
            self._socket.remove()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._reflection_pool.shutdown(wait=False, cancel_futures=True)
        self._prompt_pool.shutdown(wait=False, cancel_futures=True)
