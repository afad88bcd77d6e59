"""`maskwire-server serve`, `init` and `check`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from maskwire_server.cli.options import (
    Address,
    ConfigFile,
    RunDir,
    Settings,
    check_extra,
    loaded,
    start_log,
    stop,
)
from maskwire_server.errors import RunDirectoryError

log = logging.getLogger(__name__)


def serve(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="Go on once although recomputed steps differ from the recorded ones.")
    ] = False,
    accept_lost_history: Annotated[
        int | None,
        typer.Option(help="Go on from this step, the last that is left, on a new lineage."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a run, until SIGTERM or Ctrl-C. Started again on the same folder, it goes on."""
    chosen = loaded(config, run_dir, address, settings)
    start_log(log_level)
    if config is None:
        log.info("no configuration file (--config): built-in defaults, except for flags and the environment")
    # Read when grpc is imported: its core logs every connection that fails to speak TLS.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import serve as run

    raise typer.Exit(
        run(chosen, accept_inexact_replay=accept_inexact_replay, accept_lost_history=accept_lost_history)
    )


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("maskwire.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration with every setting and its default."""
    check_extra()
    from maskwire_server.config.template import template

    if path.exists() and not force:
        stop(f"{path} exists; choose another name, or --force to overwrite it")
    path.write_text(template(), encoding="utf-8")
    typer.echo(f"wrote {path}; next: maskwire-server check --config {path}")


def check(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
) -> None:
    """Check a configuration: parameters, memory, and the batch that fits. Exit 1 when it does not fit."""
    chosen = loaded(config, run_dir, address, settings)
    from maskwire_server.recovery import recorded_config
    from maskwire_server.training.footprint import footprint

    try:
        chosen = recorded_config.of_run(chosen, chosen.run.dir)
    except RunDirectoryError as error:  # for example while a server uses the run
        typer.echo(f"The run's own record is not looked at: {error}", err=True)
    report = footprint(chosen.model, chosen.objective, chosen.optimizer, chosen.serve)
    for line in report.lines:
        typer.echo(line)
    if not report.fits:
        raise typer.Exit(1)
