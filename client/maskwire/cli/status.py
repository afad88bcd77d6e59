"""The commands `maskwire status` and `maskwire health`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.live import Live

from maskwire.cli import exit_codes
from maskwire.cli.display import seconds_left, show, status_table, to_json
from maskwire.cli.options import Json, ServerConnection, with_server
from maskwire.client import Client
from maskwire.credentials import Endpoint
from maskwire.errors import UnavailableError, read_failure
from maskwire.standard_streams import reader_gone

HEALTH_METHOD = "/grpc.health.v1.Health/Check"


@with_server(retry_for=5.0)
def status(
    server: ServerConnection,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second, until Ctrl-C.")] = False,
    until_step: Annotated[
        int | None, typer.Option(min=0, help="Also estimate the time left until this step.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the run's state, step, speed and writer, and what the run is waiting for."""
    with server.attach() as client:
        if not watch:
            _show_status(client, until_step, as_json)
            return
        with Live(console=Console(highlight=False), auto_refresh=False) as live:
            while True:
                if as_json or not live.console.is_terminal:
                    _show_status(client, until_step, as_json)
                    if reader_gone():
                        return
                else:
                    live.update(status_table(client.status(), until_step), refresh=True)
                time.sleep(1)


def _show_status(client: Client, until_step: int | None, as_json: bool) -> None:
    found = client.status()
    shown = to_json(found) | {"seconds_left": seconds_left(found, until_step)}
    show(shown, as_json, lambda: status_table(found, until_step))


@with_server(retry_for=5.0)
def health(
    server: ServerConnection,
    service: Annotated[
        str,
        typer.Option(
            help="Empty for readiness (training steps are accepted), or 'liveness' (the process responds)."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Check whether the server is serving.

    The exit code is 0 if it is serving, 1 if it is not, and 3 if it does not answer within --retry-for
    seconds.
    """
    endpoint = Endpoint.of(server.target, **server.credentials)
    with endpoint.channel() as channel:
        # The messages of grpc.health.v1 are encoded by hand, which saves the client a dependency: field 1 of
        # the request is the service, field 1 of the response is the status, where 1 means SERVING.
        call: Any = channel.unary_unary(HEALTH_METHOD)
        name = service.encode()
        if len(name) > 127:  # a longer name needs a length of two bytes
            raise ValueError(f"--service must be at most 127 bytes long, got {len(name)} bytes")
        request = b"\x0a" + bytes([len(name)]) + name if name else b""
        try:
            serving = _check(call, request, server.retry_for, endpoint)
        except grpc.RpcError as error:
            failure = read_failure(error)
            if failure.error.reason == "NOT_FOUND":
                raise ValueError(f"--service must be empty or 'liveness', got {service!r}") from None
            if failure.unreachable:
                raise UnavailableError(
                    f"{server.target} did not answer ({failure.error}); check that the server is running and "
                    "the address is right",
                    reason=failure.error.reason,
                ) from None
            raise failure.error from None
    show({"serving": serving}, as_json, lambda: "serving" if serving else "not serving")
    if not serving:
        raise typer.Exit(exit_codes.REFUSED)


def _check(call: Any, request: bytes, seconds: float, endpoint: Endpoint) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        left = max(0.01, deadline - time.monotonic())
        try:
            answer: bytes = call(request, timeout=left, metadata=endpoint.metadata)
            return answer == b"\x08\x01"
        except grpc.RpcError as error:
            if not read_failure(error).unreachable or left <= 0.1:
                raise
            time.sleep(0.1)
