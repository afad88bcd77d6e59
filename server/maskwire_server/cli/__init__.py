"""The command `maskwire-server`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from maskwire._version import __version__
from maskwire_server.cli import streams
from maskwire_server.cli.init import init
from maskwire_server.cli.inspection import inspect, replay, verify
from maskwire_server.cli.serve import check, serve
from maskwire_server.cli.weights import export, import_x_transformers

app = typer.Typer(
    name="maskwire-server",
    help="Train and serve a masked-token model over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, init, check, verify, inspect, replay):
    app.command()(command)
app.command("import-x-transformers")(import_x_transformers)
app.command()(export)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train and serve a masked-token model over gRPC."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def limit_spinning() -> None:
    """Have OpenMP's waiting threads sleep after some microseconds, unless the environment says otherwise.

    By default they spin for much longer. If another program uses one of the cores, a step then takes twice to
    many times as long. This works only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Run the command `maskwire-server`, and exit with its code."""
    streams.protect()
    limit_spinning()
    try:
        app()
    except SystemExit as end:
        code, message = streams.finish(end.code)
        if message:
            typer.echo(f"maskwire-server: {message}", err=True)
        raise SystemExit(code) from None
