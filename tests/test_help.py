"""The help of every command is printed as it is written: rich takes [words] for markup and drops them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from maskwire.cli import app as client_app
from maskwire_server.cli import app as server_app

APPS = {"maskwire": client_app, "maskwire-server": server_app}
WIDE = {"COLUMNS": "5000", "TERMINAL_WIDTH": "5000"}
"""A terminal in which no paragraph is wrapped."""


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command with the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *path, name)


def missing(app: typer.Typer, path: tuple[str, ...], command: Any) -> list[str]:
    """The paragraphs of a command's help that are not printed as they are written."""
    done = CliRunner().invoke(app, [*path, "--help"], env=WIDE)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.output.replace("│", " ").split())
    texts = [command.help, command.epilog, *(getattr(one, "help", None) for one in command.params)]
    paragraphs = [part for text in texts for part in re.split(r"\n\s*\n", text or "")]
    written = [" ".join(part.replace("\\[", "[").split()) for part in paragraphs]
    return [part for part in written if part not in printed]


CASES = [
    (name, path, command)
    for name, app in APPS.items()
    for path, command in commands(typer.main.get_command(app))
]


@pytest.mark.parametrize(
    ("name", "path", "command"), CASES, ids=[" ".join([name, *path]) for name, path, _ in CASES]
)
def test_no_word_of_a_commands_help_is_lost(name: str, path: tuple[str, ...], command: Any) -> None:
    assert missing(APPS[name], path, command) == []


def test_every_command_is_looked_at() -> None:
    found = {(name, *path) for name, path, _ in CASES}
    assert {("maskwire", "checkpoint", "download"), ("maskwire-server", "init")} < found
    assert len(found) > 15


def test_a_word_that_rich_takes_for_markup_is_found() -> None:
    app = typer.Typer()

    @app.command()
    def example(size: Annotated[int, typer.Option(help="Goes into [model].")] = 1) -> None:
        """Write the schedule of [objective].

        And \\[this] stays.
        """

    lost = missing(app, (), typer.main.get_command(app))
    assert lost == ["Write the schedule of [objective].", "Goes into [model]."]
