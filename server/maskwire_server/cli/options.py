"""Code that the commands share: options, loading the configuration, and exiting with an error."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from maskwire_server.telemetry.log_formats import JsonFormatter, TextFormatter

T = TypeVar("T")

_NEEDS = ("torch", "einops", "safetensors", "pydantic_settings", "grpc_health", "grpc_reflection")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file, as written by `maskwire-server init`."),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run directory. Overrides run.dir.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Address to listen on. Overrides serve.address.")
]
Run = Annotated[Path, typer.Option("--run-dir", help="Run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting. Can be repeated."),
]


def read_run(read: Callable[[], T]) -> T:
    """Call `read`, which reads a run directory, and return its result. If it fails, exit with code 3."""
    from maskwire_server.errors import RunDirectoryError

    try:
        return read()
    except RunDirectoryError as error:
        for line in str(error).splitlines():
            typer.echo(f"maskwire-server: {line}", err=True)
        raise typer.Exit(3) from None


def start_log(level_name: str, log_format: str = "text") -> None:
    """Log messages of this level and above to stderr. `log_format` is text or json."""
    level = logging.getLevelNamesMapping().get(level_name.upper())
    if level is None:
        stop(f"--log-level must be debug, info, warning or error, got {level_name!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])


def loaded(config: Path | None, run_dir: Path | None, address: str | None, settings: list[str] | None) -> Any:
    """Load the configuration from file, environment and flags. If it is invalid, exit with code 2."""
    check_extra()
    from maskwire_server.config import load
    from maskwire_server.config.sources import FREE_TABLES, decoded
    from maskwire_server.errors import ConfigError

    flags: dict[str, dict[str, Any]] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        *tables, name = key.split(".")
        if not equals or not tables:
            stop(f"--set must be SECTION.KEY=VALUE, got {setting!r}")
        table: Any = flags
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                stop(f"--set {key}: {part} was set to a value before, and cannot have keys")
        is_toml = value.startswith(("[", "{")) or tuple(tables) in FREE_TABLES
        table[name] = decoded(value) if is_toml else value
    if run_dir is not None:
        flags.setdefault("run", {})["dir"] = run_dir
    if address is not None:
        flags.setdefault("serve", {})["address"] = address
    try:
        return load(config, **flags)
    except ConfigError as error:
        stop(*str(error).splitlines())


def check_extra() -> None:
    """If the server's packages are missing, print the command that installs them, and exit."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        stop(f'the server needs {", ".join(missing)}; install with: pip install "maskwire[server]"')


def stop(*lines: str) -> NoReturn:
    """Print the lines as errors and exit with code 2."""
    for line in lines:
        typer.echo(f"maskwire-server: {line}", err=True)
    raise typer.Exit(2)
