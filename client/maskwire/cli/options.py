"""Options that several commands share: data, output, and the connection to a server."""

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
from maskwire.data.file_data import packed_length
from maskwire.data.token_data import TokenData
from maskwire.nonfatal_output import tell
from maskwire.results import ModelInfo

DEFAULT_TARGET = "127.0.0.1:50051"

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and errors as JSON on stderr.")
]
Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        show_default=False,
        help="Text files or folders of them, each byte a token; JSON Lines, CSV, Parquet or Arrow files; an "
        "address such as s3://BUCKET/FOLDER; or one .npy file of ids, one folder written by `maskwire data "
        "prepare`, or with --dtype one file of packed ids.",
    ),
]
DATA_PANEL = "Data"
TextField = Annotated[
    str | None,
    typer.Option(
        help="The field of a record that holds its text. By default 'text'.",
        show_default=False,
        rich_help_panel=DATA_PANEL,
    ),
]
PromptField = Annotated[
    str | None,
    typer.Option(
        help="The field of a record that holds a prompt, which is given and never masked. With "
        "--response-field.",
        show_default=False,
        rich_help_panel=DATA_PANEL,
    ),
]
ResponseField = Annotated[
    str | None,
    typer.Option(
        help="The field of a record that holds the response to train on. With --prompt-field.",
        show_default=False,
        rich_help_panel=DATA_PANEL,
    ),
]
Pattern = Annotated[
    str,
    typer.Option(
        help="In folders, use only the files whose names match, such as '*.txt'.", rich_help_panel=DATA_PANEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="The path is one file of packed ids of this type: uint8, uint16 or int32 (also for uint32).",
        rich_help_panel=DATA_PANEL,
    ),
]
AnyFormat = Annotated[
    bool,
    typer.Option(
        "--any-format",
        help="Also read files that are not text (archives, arrays, JSON Lines) as bytes, instead of refusing "
        "them.",
        rich_help_panel=DATA_PANEL,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens per row. By default the longest row that the model takes.", rich_help_panel=DATA_PANEL
    ),
]


def length_of_paths(length: int | None, paths: Any) -> int:
    """Return the row length to open data with, before the model is known.

    It is --length if that is given, or else the length of packed rows, or else 1.
    """
    return packed_length(paths) or 1 if length is None else length


def row_length(length: int | None, model: ModelInfo, data: TokenData | None = None) -> int:
    """Return the tokens per row: the length of packed rows, or --length, or the model's longest row.

    Raises ValueError if the model takes no rows of this length.
    """
    packed = None if data is None else data.packed_length
    if packed is not None and packed > model.max_seq_len:
        raise ValueError(
            f"the data is packed into rows of {packed} tokens, but the longest row of the model has "
            f"{model.max_seq_len} (max_seq_len): prepare the data again with --pack {model.max_seq_len}, or "
            f"start a run with max_seq_len = {packed}"
        )
    if packed is not None:
        return packed
    if length is not None and not 1 <= length <= model.max_seq_len:
        raise ValueError(
            f"--length must be 1 to {model.max_seq_len}, the longest row of the model, got {length}"
        )
    return model.max_seq_len if length is None else length


_CONNECTION = "Connection"
_SECURITY = "TLS and token"
SHARED: dict[str, Any] = {
    "target": Annotated[
        str,
        typer.Option(
            "--target", "-t", envvar="MASKWIRE_TARGET", help="Address of the server: HOST:PORT or unix:PATH.",
            rich_help_panel=_CONNECTION,
        ),
    ],
    "tls": Annotated[
        bool,
        typer.Option(
            "--tls", envvar="MASKWIRE_TLS",
            help="Use TLS, and trust the system's certificate authorities.",
            rich_help_panel=_SECURITY,
        ),
    ],
    "ca": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_CA", help="PEM file of the certificate authority to trust. Implies --tls.",
            rich_help_panel=_SECURITY,
        ),
    ],
    "cert": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_CERT", help="PEM file of the client certificate.", rich_help_panel=_SECURITY
        ),
    ],
    "key": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_KEY", help="PEM file of the private key of --cert.", rich_help_panel=_SECURITY
        ),
    ],
    "server_name": Annotated[
        str | None,
        typer.Option(
            envvar="MASKWIRE_SERVER_NAME", help="Name in the server's certificate, if it differs from "
            "the host in --target.", rich_help_panel=_SECURITY,
        ),
    ],
    "token_file": Annotated[
        Path | None,
        typer.Option(
            envvar="MASKWIRE_TOKEN_FILE", help="File with the bearer token.", rich_help_panel=_SECURITY
        ),
    ],
    "allow_insecure": Annotated[
        bool,
        typer.Option(
            "--allow-insecure", envvar="MASKWIRE_ALLOW_INSECURE",
            help="Allow sending the token to another machine without TLS.", rich_help_panel=_SECURITY,
        ),
    ],
    "retry_for": Annotated[
        float,
        typer.Option(
            "--retry-for", help="Seconds to retry while the server does not answer: by default 300 for "
            "train and download, 5 for status and health, otherwise 60.",
            rich_help_panel=_CONNECTION,
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
class ServerConnection:
    """The address of the server that a command connects to, with the credentials for it."""

    target: str
    retry_for: float
    credentials: CredentialOptions
    as_json: bool

    def wait(self, words: str) -> None:
        """Report on stderr what the command is waiting for."""
        tell(json.dumps({"waiting": words}) if self.as_json else words)

    def tell_takeover(self, words: str) -> None:
        """Report on stderr whose session was taken over."""
        tell(json.dumps({"takeover": words}) if self.as_json else words)

    def attach(self) -> Client:
        """Return a Client, which opens no session."""
        return attach(
            self.target, retry_for=self.retry_for, on_wait=self.wait, **self.credentials
        )  # fmt: skip

    def connect(self, **options: Any) -> Trainer:
        """Open a session as the run's writer, and return its Trainer."""
        return connect(
            self.target, retry_for=self.retry_for, on_wait=self.wait, on_takeover=self.tell_takeover,
            **options, **self.credentials,
        )  # fmt: skip


def with_server(retry_for: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: replace its parameter `server` by connection options, and report its errors.

    `retry_for` is the default of --retry-for, in seconds. An error ends the command with an exit code, and is
    shown as JSON if the command's parameter `as_json` is true.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        defaults = {**_DEFAULTS, "retry_for": retry_for}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in defaults}
            target, wait = chosen.pop("target"), chosen.pop("retry_for")
            chosen["tls"] = chosen["tls"] or None
            with exit_codes.errors(given.get("as_json", False)):
                server = ServerConnection(
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
