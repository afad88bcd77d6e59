"""What the commands share: options, the configuration, and how they stop."""

from __future__ import annotations

import importlib.util
import logging
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

_NEEDS = ("torch", "einops", "safetensors", "pydantic_settings", "grpc_health", "grpc_reflection")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file; `maskwire-server init` writes one.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run, in place of run.dir.")]
Address = Annotated[str | None, typer.Option("--address", help="HOST:PORT, in place of serve.address.")]
Run = Annotated[Path, typer.Option("--run-dir", help="Folder of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated."),
]


def of_run(look: Callable[[], T]) -> T:
    """What is found in a run directory; one that cannot be read ends the command with code 3."""
    from maskwire_server.errors import RunDirectoryError

    try:
        return look()
    except RunDirectoryError as error:
        for line in str(error).splitlines():
            typer.echo(f"maskwire-server: {line}", err=True)
        raise typer.Exit(3) from None


def start_log(level_name: str) -> None:
    """Log to stderr from this level on."""
    level = logging.getLevelNamesMapping().get(level_name.upper())
    if level is None:
        stop(f"--log-level must be debug, info, warning or error, got {level_name!r}")
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )


def loaded(config: Path | None, run_dir: Path | None, address: str | None, settings: list[str] | None) -> Any:
    """The configuration of file, environment and flags; a wrong one ends the command with code 2."""
    check_extra()
    from maskwire_server.config import load
    from maskwire_server.errors import ConfigError

    flags: dict[str, dict[str, Any]] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            stop(f"--set must be SECTION.KEY=VALUE, got {setting!r}")
        flags.setdefault(section, {})[name] = _list(value) if value.startswith("[") else value
    if run_dir is not None:
        flags.setdefault("run", {})["dir"] = run_dir
    if address is not None:
        flags.setdefault("serve", {})["address"] = address
    try:
        return load(config, **flags)
    except ConfigError as error:
        stop(*str(error).splitlines())


def _list(value: str) -> Any:
    """A list as TOML writes it; what is none is left to the setting's own check."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def check_extra() -> None:
    """End the command, naming the extra, where the server's packages are not installed."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        stop(f'the server needs {", ".join(missing)}: pip install "maskwire[server]"')


def stop(*lines: str) -> Any:
    """Say why and end the command with code 2."""
    for line in lines:
        typer.echo(f"maskwire-server: {line}", err=True)
    raise typer.Exit(2)
