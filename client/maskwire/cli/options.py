"""The options that every command which talks to a server has, said once."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire.cli import exit_codes
from maskwire.client import Client, Trainer, attach, connect
from maskwire.credentials import CredentialOptions
from maskwire.output import tell

DEFAULT_TARGET = "127.0.0.1:50051"

Json = Annotated[bool, typer.Option("--json", help="Print JSON; errors too, on stderr.")]
Paths = Annotated[
    list[Path],
    typer.Argument(
        help="Files or folders, each byte a token; or one .npy file, one folder of `data prepare`, or with "
        "--dtype one file of packed ids."
    ),
]
Pattern = Annotated[str, typer.Option(help="Which files of a folder.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="uint8, uint16 or int32 (also for uint32): the file holds packed ids of this type."),
]
AnyFormat = Annotated[
    bool,
    typer.Option(
        "--any-format", help="Take files of every format as they are: archives, packed ids, JSON lines."
    ),
]
Length = Annotated[int | None, typer.Option(help="Tokens a row; the model's longest by default.")]

_DOOR = "TLS and token"
SHARED: dict[str, Any] = {
    "target": Annotated[
        str,
        typer.Option("--target", "-t", envvar="MASKWIRE_TARGET", help="HOST:PORT, or unix:PATH."),
    ],
    "tls": Annotated[
        bool,
        typer.Option(
            "--tls", envvar="MASKWIRE_TLS", help="Speak TLS, by the system's authorities.",
            rich_help_panel=_DOOR,
        ),
    ],
    "ca": Annotated[
        Path | None,
        typer.Option(envvar="MASKWIRE_CA", help="PEM file of the authority to trust.", rich_help_panel=_DOOR),
    ],
    "cert": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_CERT", help="PEM file of this client's certificate.", rich_help_panel=_DOOR
        ),
    ],
    "key": Annotated[
        Path | None,
        typer.Option(envvar="MASKWIRE_KEY", help="PEM file of its key.", rich_help_panel=_DOOR),
    ],
    "server_name": Annotated[
        str | None,
        typer.Option(
            envvar="MASKWIRE_SERVER_NAME", help="The name in the server's certificate, if it is not "
            "the target's.", rich_help_panel=_DOOR,
        ),
    ],
    "token_file": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_TOKEN_FILE", help="File that holds the bearer token.", rich_help_panel=_DOOR
        ),
    ],
    "allow_insecure": Annotated[
        bool,
        typer.Option(
            "--allow-insecure", envvar="MASKWIRE_ALLOW_INSECURE",
            help="Send the token in plaintext beyond this machine.", rich_help_panel=_DOOR,
        ),
    ],
    "retry_for": Annotated[
        float,
        typer.Option(
            "--retry-for", help="Seconds to wait for a server that does not answer: 300 to train and "
            "download, 5 for status and health, 60 otherwise.",
        ),
    ],
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "target": DEFAULT_TARGET,
    "tls": False,
    "ca": None,
    "cert": None,
    "key": None,
    "server_name": None,
    "token_file": None,
    "allow_insecure": False,
}


@dataclass(frozen=True)
class Server:
    """Where the server is and how to come in."""

    target: str
    retry_for: float
    door: CredentialOptions
    as_json: bool

    def wait(self, words: str) -> None:
        """Tell what is waited for."""
        tell(json.dumps({"waiting": words}) if self.as_json else words)

    def tell_takeover(self, words: str) -> None:
        """Tell whose session was taken over."""
        tell(json.dumps({"takeover": words}) if self.as_json else words)

    def attach(self) -> Client:
        """A client without a session."""
        return attach(
            self.target, retry_for=self.retry_for, on_wait=self.wait, **self.door
        )  # fmt: skip

    def connect(self, **options: Any) -> Trainer:
        """The run's writer."""
        return connect(
            self.target, retry_for=self.retry_for, on_wait=self.wait, on_takeover=self.tell_takeover,
            **options, **self.door,
        )  # fmt: skip


def with_server(retry_for: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options above in place of its parameter `server`, and errors their exit codes.

    `retry_for` is the default of --retry-for; the command's own `as_json` says how errors are shown.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        defaults = {**_DEFAULTS, "retry_for": retry_for}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in defaults}
            target, wait = chosen.pop("target"), chosen.pop("retry_for")
            chosen["tls"] = chosen["tls"] or None
            with exit_codes.errors(given.get("as_json", False)):
                server = Server(
                    target, wait, typing.cast(CredentialOptions, chosen), given.get("as_json", False)
                )
                command(server=server, **given)

        hints = typing.get_type_hints(command, include_extras=True)
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "server"]
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
        parameters = [*(p.replace(kind=kind) for p in own), *shared]
        annotations = {name: hint for name, hint in {**hints, **SHARED}.items() if name != "server"}
        run.__annotations__ = annotations
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(annotation=annotations[p.name]) for p in parameters]
        )
        del run.__wrapped__
        return run

    return decorate
