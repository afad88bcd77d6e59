"""The command `maskwire-server`."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

_NEEDS = ("torch", "einops", "safetensors", "pydantic_settings", "grpc_health", "grpc_reflection")

app = typer.Typer(
    name="maskwire-server",
    help="Serve one masked-prediction training run over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file; `maskwire-server init` writes one.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run, in place of run.dir.")]
Address = Annotated[str | None, typer.Option("--address", help="HOST:PORT, in place of serve.address.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated."),
]


@app.command()
def serve(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="Go on once although recomputed steps differ from the recorded ones.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a run, until SIGTERM or Ctrl-C. Started again on the same folder, it goes on."""
    loaded = _load(config, run_dir, address, settings)
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        _stop(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    # Read when grpc is imported: its core logs every connection that fails to speak TLS.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import serve as run

    raise typer.Exit(run(loaded, accept_inexact_replay=accept_inexact_replay))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("maskwire.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration with every setting and its default."""
    _check_extra()
    from maskwire_server.template import template

    if path.exists() and not force:
        _stop(f"{path} exists; choose another name, or --force to overwrite it")
    path.write_text(template())
    typer.echo(f"wrote {path}; next: maskwire-server check --config {path}")


@app.command()
def check(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
) -> None:
    """Check a configuration: parameters, memory, and the batch that fits. Exit 1 when it does not fit."""
    loaded = _load(config, run_dir, address, settings)
    from maskwire_server.training.footprint import footprint

    report = footprint(loaded.model, loaded.objective, loaded.optimizer, loaded.serve)
    for line in report.lines:
        typer.echo(line)
    if not report.fits:
        raise typer.Exit(1)


def _load(config: Path | None, run_dir: Path | None, address: str | None, settings: list[str] | None) -> Any:
    _check_extra()
    from maskwire_server.config import load
    from maskwire_server.errors import ConfigError

    flags: dict[str, dict[str, Any]] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            _stop(f"--set must be SECTION.KEY=VALUE, got {setting!r}")
        flags.setdefault(section, {})[name] = _list(value) if value.startswith("[") else value
    if run_dir is not None:
        flags.setdefault("run", {})["dir"] = run_dir
    if address is not None:
        flags.setdefault("serve", {})["address"] = address
    try:
        return load(config, **flags)
    except ConfigError as error:
        _stop(*str(error).splitlines())


def _list(value: str) -> Any:
    """A list as TOML writes it; what is none is left to the setting's own check."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _check_extra() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f'the server needs {", ".join(missing)}: pip install "maskwire[server]"')


def _stop(*lines: str) -> Any:
    for line in lines:
        typer.echo(f"maskwire-server: {line}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point."""
    app()
