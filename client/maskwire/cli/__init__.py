"""The command `maskwire`. `maskwire.cli.exits` has its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from maskwire import __version__
from maskwire.cli import exits
from maskwire.cli.checkpoints import checkpoint_app
from maskwire.cli.data import data_app
from maskwire.cli.evaluating import evaluate
from maskwire.cli.generating import generate
from maskwire.cli.training import train
from maskwire.cli.watching import health, status

app = typer.Typer(
    name="maskwire",
    help="Train a masked-token model on another machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: "
    + " · ".join(
        f"{code} {meaning.partition(':')[0].partition(';')[0]}" for code, meaning in exits.CODES.items()
    ),
)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(generate)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(status)
app.command()(health)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train a masked-token model on another machine."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point."""
    exits.on_signals()
    try:
        app()
    except SystemExit as end:
        raise SystemExit(exits.by_signal(end.code)) from None
