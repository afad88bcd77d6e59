"""What the files under deploy/ and examples/ start, checked with the parsers of the real commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
import typer.main

import maskwire.cli
import maskwire_server.cli
from maskwire_server import config
from maskwire_server.config import Config

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSION = "1.32"
"""The version of Kubernetes that the manifests are checked against."""
NOT_YET = {"telemetry"} - Config.model_fields.keys()
"""Sections that the launch files set and this version of the server lacks."""
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What a program raises for a command that it does not understand."""
_PROGRAMS: dict[str, Any] = {"maskwire": maskwire.cli.app, "maskwire-server": maskwire_server.cli.app}


def parsed(command: list[str]) -> dict[str, Any]:
    """Parse a command as its program would, run nothing, and return the values of its options.

    Raises UsageError, as the program does, if an option does not exist or has a value that it rejects.
    """
    program, *arguments = command
    found: Any = typer.main.get_command(_PROGRAMS[program])
    names = [program]
    while hasattr(found, "commands"):
        name = arguments.pop(0) if arguments else ""
        if name not in found.commands:
            raise UsageError(f"{' '.join(names)} has no command {name!r}")
        found = found.commands[name]
        names.append(name)
    context = found.make_context(" ".join(names), list(arguments))
    return dict(context.params)


def settings(environment: dict[str, str]) -> Config:
    """The server's configuration under variables MASKWIRE_SECTION__KEY. Raises ConfigError."""
    given: dict[str, dict[str, Any]] = {}
    for variable, value in environment.items():
        section, _, key = variable.removeprefix("MASKWIRE_").lower().partition("__")
        if section not in NOT_YET:
            given.setdefault(section, {})[key] = value
    return config.load(None, **given)


def client_variables() -> set[str]:
    """The variables that the options of `maskwire` read."""
    return {
        variable
        for command in typer.main.get_command(maskwire.cli.app).commands.values()  # type: ignore[attr-defined]
        for option in command.params
        for variable in ([option.envvar] if isinstance(option.envvar, str) else option.envvar or [])
    }
