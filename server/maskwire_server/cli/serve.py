"""`maskwire-server serve` and `check`: serve a run, and check a configuration."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskwire_server.cli.options import (
    Address,
    ConfigFile,
    RunDir,
    Settings,
    loaded,
    read_run,
    start_log,
    stop,
)
from maskwire_server.error_output import say
from maskwire_server.errors import ConfigError, RunDirectoryError
from maskwire_server.exit_codes import EXIT_CONFIG
from maskwire_server.ranks.launcher import Launch, check_layout, end_with_launcher, launch

if TYPE_CHECKING:
    from maskwire_server.config import DistributedConfig  # needs the extra `server`

log = logging.getLogger(__name__)


def serve(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="For this start, accept recomputed steps that differ from the recorded ones.")
    ] = False,
    accept_lost_history: Annotated[
        int | None,
        typer.Option(help="Continue from this step, the last one that was not lost, on a new lineage."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Train with this many processes on this host (docs/scale.md).")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="With --ranks: the number of hosts. 1 by default.")
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(help="With --nodes: HOST:PORT of the host that has the run directory."),
    ] = None,
) -> None:
    """Serve a run until SIGTERM or Ctrl-C. Starting it again on the same run directory resumes the run."""
    is_rank = ranks is None and "WORLD_SIZE" in os.environ
    if is_rank:
        end_with_launcher()  # before the imports, which take seconds
    if ranks is None and (rendezvous is not None or (nodes or 1) > 1):
        stop(f"{'--rendezvous' if nodes in (None, 1) else '--nodes'} needs --ranks, got none")
    if nodes is None and rendezvous is not None:
        stop(f"--rendezvous needs --nodes, the number of hosts, got only {rendezvous}")
    chosen = loaded(config, run_dir, address, settings)
    start_log(log_level, chosen.telemetry.log_format)
    layout = chosen.distributed
    if ranks is None and not is_rank and (layout.replicate > 1 or (layout.shard or 1) > 1):
        say(
            "distributed: replicate and shard divide ranks, and need --ranks, got "
            f"{layout.replicate} x {layout.shard or 'off'} without it"
        )
        raise typer.Exit(EXIT_CONFIG)
    if ranks is not None:
        given = {"config": config, "run-dir": run_dir, "address": address, "log-level": log_level,
                 "accept-lost-history": accept_lost_history}  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
        arguments += [f"--set={each}" for each in settings or []]
        arguments += ["--accept-inexact-replay"] * accept_inexact_replay
        follows = bool(chosen.serve.certificate_files or chosen.serve.token_files)
        launched = Launch(ranks, nodes or 1, rendezvous, chosen.serve.drain_seconds, follows)
        raise typer.Exit(_launched(chosen.distributed, launched, ["serve", *arguments]))
    if config is None:
        log.info("no configuration file (--config): using the defaults, flags and the environment")
    # Read when grpc is imported. Without it, grpc logs every connection that fails its TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import serve as run
    from maskwire_server.app import serve_rank

    how: dict[str, Any] = {
        "accept_inexact_replay": accept_inexact_replay,
        "accept_lost_history": accept_lost_history,
    }
    if is_rank:
        serve_rank(chosen, **how)
    raise typer.Exit(run(chosen, **how))


def _launched(distributed: DistributedConfig, group: Launch, arguments: list[str]) -> int:
    try:
        check_layout(distributed, group.ranks * group.nodes)
        return launch(group, arguments)
    except ConfigError as error:
        say(error)
        return EXIT_CONFIG


def check(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List each parameter: how it is trained, its shape and name.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Report each layout for `serve` with this many ranks per host."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="With --ranks: the number of hosts.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --ranks: the memory of a device, as 80GiB, to plan for GPUs of another machine."
        ),
    ] = None,
) -> None:
    """Check a configuration and report its parameters and memory. Exits with 1 if the memory is too small.

    With --ranks, also if the configured layout is not possible for the model.
    """
    if ranks is None and (memory is not None or nodes > 1):
        stop(f"{'--memory' if memory is not None else '--nodes'} needs --ranks, got none")
    size = None if memory is None else _bytes(memory)
    chosen = loaded(config, run_dir, address, settings)
    from maskwire_server.effective_config import with_model, with_schedule
    from maskwire_server.recovery import recorded_config
    from maskwire_server.training.footprint import footprint
    from maskwire_server.training.rank_memory import Machines, layouts

    operators = chosen
    try:
        chosen = recorded_config.of_run(chosen, chosen.run.dir)
    except RunDirectoryError as error:  # for example, while a server uses the run
        typer.echo(f"maskwire-server: the settings that the run recorded are not checked: {error}", err=True)
    try:
        chosen = read_run(lambda: with_schedule(with_model(chosen, operators), operators))
        sections = (chosen.model, chosen.objective, chosen.optimizer, chosen.serve)
        if ranks:
            machines = Machines(ranks, nodes, size)
            check_layout(chosen.distributed, machines.size)
            report = layouts(*sections, chosen.distributed, machines)
        else:
            report = footprint(*sections)
    except ConfigError as error:
        stop(*str(error).splitlines())
    if chosen.objective.has_schedule_function:
        typer.echo(f"schedule       {chosen.objective.schedule}, SHA-256 {chosen.objective.schedule_sha256}")
    for line in report.lines + (report.parameters if parameters else []):
        typer.echo(line)
    if not report.fits:
        raise typer.Exit(1)


def _bytes(size: str) -> int:
    """Parse a size and return its number of bytes: 80GiB is in powers of 1024, 80GB in powers of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", size)
    if found is None or not float(found[1]):
        stop(f"--memory must be a size with a unit, for example 80GiB or 80GB, got {size!r}")
    number, prefix, binary = found.groups()
    power = "KMGT".index(prefix) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)
