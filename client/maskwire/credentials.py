"""Credentials: TLS or plaintext, and the bearer token."""

from __future__ import annotations

import ipaddress
import stat
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack

import grpc

from maskwire.arguments import check_flag, check_str
from maskwire.target import check_target
from maskwire.v1.keepalive import KEEPALIVE_OPTIONS

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    *KEEPALIVE_OPTIONS,
]


class CredentialOptions(TypedDict, total=False):
    """The options of `connect` and `attach` for TLS and the bearer token."""

    tls: bool | None
    """Whether to use TLS. None: only if `ca`, `cert` or `server_name` is given."""
    ca: str | Path | None
    """PEM file of the certificate authorities to trust. None: those of the system."""
    cert: str | Path | None
    """PEM file of this client's certificate, for a server that requires one; needs `key`."""
    key: str | Path | None
    """PEM file of the certificate's private key."""
    server_name: str | None
    """The name in the server's certificate, if it differs from the target's host name."""
    token: str | None
    """Bearer token, for a server that requires one."""
    token_file: str | Path | None
    """File with the bearer token on its first line that is not a comment. A regular file is read again when
    it changes."""
    allow_insecure: bool
    """Send the token in plaintext to another machine. Anyone on the network can read it."""


class TokenFile:
    """A file that holds a bearer token. The file can be replaced while a client uses it."""

    def __init__(self, path: Path) -> None:
        """Read the token for the first time.

        Raises OSError if the file cannot be read, and ValueError if it contains no valid token.
        """
        self._path = path.absolute()  # the program may change its folder
        self._stamp: tuple[int, ...] = ()
        self._token = ""
        self.read()

    def read(self) -> str:
        """Return the token. While the file cannot be read or holds no token, return the previous one."""
        try:
            found = self._path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            # Only a regular file is read again: a pipe would wait for somebody to write to it.
            if not self._token or (stamp != self._stamp and stat.S_ISREG(found.st_mode)):
                self._token, self._stamp = _token_in(self._path), stamp
        except (OSError, ValueError):
            if not self._token:
                raise
        return self._token


@dataclass(frozen=True)
class Endpoint:
    """A server's address, and credentials for it that have been read and checked."""

    target: str
    credentials: grpc.ChannelCredentials | None = field(repr=False)
    """None: plaintext."""
    server_name: str | None
    token: TokenFile | str = field(repr=False)
    """Empty: none is sent."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata to send with a call: the bearer token, if any. A changed token file is read again."""
        token = self.token.read() if isinstance(self.token, TokenFile) else self.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    @staticmethod
    def of(target: str, **options: Unpack[CredentialOptions]) -> Endpoint:
        """Make an Endpoint: check the target and the options, and read the files.

        Raises ValueError for a wrong target or option, TypeError for an option of the wrong type, and
        OSError for an unreadable file.
        """
        check_target(target)
        for name in ("ca", "cert", "key", "token_file"):
            if not isinstance(path := options.get(name), str | Path | None):
                raise TypeError(f"{name} must be the path of a file, got {path!r}")
        for name in ("tls", "allow_insecure"):
            if (flag := options.get(name)) is not None:
                check_flag(name, flag)
        ca, cert, key = options.get("ca"), options.get("cert"), options.get("key")
        server_name = options.get("server_name")
        if (cert is None) != (key is None):
            raise ValueError(f"cert and key must be given together, got only {'cert' if cert else 'key'}")
        tls = options.get("tls")
        if tls is None:
            tls = bool(ca or cert or server_name)
        elif not tls and (ca or cert or server_name):
            raise ValueError(
                "tls=False excludes ca, cert, key and server_name: leave them out, or leave out tls=False"
            )
        credentials = None
        if tls:
            credentials = grpc.ssl_channel_credentials(*(_pem(name, path) for name, path in (
                ("ca", ca), ("key", key), ("cert", cert))))  # fmt: skip
        token, file = options.get("token"), options.get("token_file")
        for name, text in (("server_name", server_name), ("token", token)):
            if text is not None:
                check_str(name, text)
        if token is not None and file is not None:
            raise ValueError("set token or token_file, not both")
        found = _checked("token", token or "") if file is None else TokenFile(Path(file))
        if found and not tls and not options.get("allow_insecure") and not is_local(target):
            raise ValueError(
                f"the bearer token would be sent to {target} in plaintext; use TLS (tls or ca), connect "
                "through a tunnel to localhost, or allow plaintext (allow_insecure)"
            )
        return Endpoint(target, credentials, server_name, found)

    def channel(self, module: ModuleType = grpc) -> Any:
        """Open a gRPC channel to the server. `module` is `grpc` or `grpc.aio`."""
        if self.credentials is None:
            # An HTTP proxy that the environment names would send a token for this machine to another machine.
            plain = [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)]
            return module.insecure_channel(self.target, options=plain)
        options: list[tuple[str, Any]] = list(_CHANNEL_OPTIONS)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return module.secure_channel(self.target, self.credentials, options=options)


def is_local(target: str) -> bool:
    """Whether data sent to `target` stays on this machine."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pem(name: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    data = Path(path).read_bytes()
    if b"-----BEGIN " not in data:
        raise ValueError(f"{name} must be a PEM file, but {path} has no line with '-----BEGIN'")
    return data


def _token_in(file: Path) -> str:
    lines = [line.split("#")[0].split() for line in file.read_text(errors="replace").splitlines()]
    token = next((words[0] for words in lines if words), "")
    if not token:
        raise ValueError(f"token_file {file} contains no token: write the token on a line of its own")
    return _checked(f"the token in {file}", token)


def _checked(where: str, token: str) -> str:
    token = token.strip()
    if not token.isascii() or any(character.isspace() for character in token):
        raise ValueError(f"{where} must contain only ASCII characters and no spaces; copy the token again")
    return token
