"""The command `maskwire`. The module `maskwire.cli.exit_codes` lists its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from maskwire._version import __version__
from maskwire.cli import exit_codes
from maskwire.cli.checkpoints import checkpoint_app
from maskwire.cli.data import data_app
from maskwire.cli.evaluate import evaluate
from maskwire.cli.generate import generate
from maskwire.cli.status import health, status
from maskwire.cli.train import train

app = typer.Typer(
    name="maskwire",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: "
    + " · ".join(
        f"{code} {meaning.partition(':')[0].partition(';')[0]}" for code, meaning in exit_codes.CODES.items()
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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train, evaluate and sample a masked-token model that a maskwire server hosts.

    Start a server first, on this machine or another:

    maskwire-server init && maskwire-server serve --config maskwire.toml

    Then train on a folder of text files:

    maskwire train FOLDER --until-step 1000
    """
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command `maskwire`, and exit with its exit code."""
    exit_codes.handle_signals()
    try:
        app()
    except SystemExit as end:
        raise SystemExit(exit_codes.correct_exit_code(end.code)) from None
