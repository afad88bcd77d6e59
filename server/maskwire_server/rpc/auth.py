"""Access control by TLS certificates and bearer tokens, checked before a request's body is read."""

from __future__ import annotations

import enum
import hashlib
import hmac
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError, Refused
from maskwire_server.rpc.call_events import Publish, rejected
from maskwire_server.rpc.error_status import abort

MIN_TOKEN_LENGTH = 16
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection."
_SERVICE = "/maskwire.v1.TrainingService/"


class Role(enum.IntEnum):
    """What a token permits. Each role also permits everything that the roles listed before it permit."""

    READ = 1
    TRAIN = 2
    ADMIN = 3


REQUIRED_ROLES: dict[str, Role] = {
    "GetStatus": Role.READ,
    "EvalLoss": Role.READ,
    "Generate": Role.READ,
    "ListCheckpoints": Role.READ,
    "ListSteps": Role.READ,
    "GetTokenizer": Role.READ,
    "OpenSession": Role.TRAIN,
    "CloseSession": Role.TRAIN,
    "TrainStep": Role.TRAIN,
    "KeepTokenizer": Role.TRAIN,
    "Checkpoint": Role.TRAIN,
    "RestoreCheckpoint": Role.ADMIN,
    "DeleteCheckpoint": Role.ADMIN,
    "DownloadCheckpoint": Role.ADMIN,  # the default of serve.download_role
}
"""The lowest role that may call each method. A method that is not listed requires the role admin."""


@dataclass(frozen=True)
class Token:
    """The hash of a token, and what the token permits. The token itself is not kept in memory."""

    digest: bytes
    """The SHA-256 of the token."""
    role: Role
    expires: float | None
    """When the token expires, in seconds since the Unix epoch; None: never."""


class TokenInterceptor(grpc.ServerInterceptor):
    """Rejects calls without a valid token, also calls of health and reflection, whose bodies can be large.

    A rejected call gets a streaming handler that never reads the body. Rejecting a request of 64 MiB takes
    38 MiB of memory this way, and 227 MiB with a unary handler.
    """

    def __init__(
        self,
        tokens: list[Token],
        download_role: Role,
        clock: Callable[[], float] = time.time,
        publish: Publish = lambda _: None,
    ) -> None:
        self._tokens = tokens  # another thread may assign a new list; no list is modified
        self._required_roles = {**REQUIRED_ROLES, "DownloadCheckpoint": download_role}
        self._clock = clock
        self._publish = publish

    def replace(self, tokens: list[Token]) -> None:
        """Check calls that arrive from now on against `tokens` only."""
        self._tokens = tokens

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Reject the call unless its token is valid and has the role that the method requires."""
        try:
            self._check(handler_call_details.method, handler_call_details.invocation_metadata)
        except Refused as refusal:
            self._publish(rejected(handler_call_details.method, refusal))
            return _rejecting_handler(refusal)
        return continuation(handler_call_details)

    def _check(self, method: str, metadata: Any) -> None:
        required = Role.READ
        if not method.startswith((_HEALTH, _REFLECTION)):
            required = self._required_roles.get(method.removeprefix(_SERVICE), Role.ADMIN)
        token = _bearer_token(metadata)
        if not token:
            raise Refused(
                "UNAUTHENTICATED",
                "this server requires one 'authorization: Bearer TOKEN' in the call's metadata",
            )
        found = self._find(token)
        if found is None:
            raise Refused("UNAUTHENTICATED", "this server does not know the token; check it, or use another")
        if found.expires is not None and self._clock() >= found.expires:
            raise Refused("UNAUTHENTICATED", "the token has expired; use a new one")
        if found.role < required:
            raise Refused(
                "PERMISSION_DENIED",
                f"{method.rpartition('/')[2]} requires a token of role {required.name.lower()}, but this "
                f"token has role {found.role.name.lower()}; use another token",
                role=found.role.name.lower(),
                needed_role=required.name.lower(),
            )

    def _find(self, token: str) -> Token | None:
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._tokens:  # no early exit: the time taken must not reveal which token matched
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found


def _bearer_token(metadata: Any) -> str:
    """The bearer token of the call's authorization header; empty unless there is exactly one such header."""
    headers = [value for key, value in metadata or () if key == "authorization"]
    scheme, _, token = (str(headers[0]) if len(headers) == 1 else "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _rejecting_handler(refusal: Refused) -> grpc.RpcMethodHandler[Any, Any]:
    def reject(_: object, context: grpc.ServicerContext) -> object:
        abort(context, refusal)

    return grpc.stream_stream_rpc_method_handler(reject)


def caller(context: grpc.ServicerContext, *, has_tokens: bool) -> str:
    """A name for the call's credential that does not reveal the credential; empty if the call has none.

    The credential is the bearer token if the server `has_tokens`. Otherwise it is the client certificate,
    because such a server does not check tokens.
    """
    secret = b"\0".join(context.peer_identities() or ())
    if has_tokens:
        secret = _bearer_token(context.invocation_metadata()).encode("utf-8", "surrogateescape")
    return hashlib.sha256(secret).hexdigest()[:16] if secret else ""


def read_tokens(config: ServeConfig) -> list[Token]:
    """Read the tokens in the configured files; empty if no file is configured. Raises ConfigError."""
    tokens: dict[bytes, Token] = {}
    for role in Role:
        name = f"token_{role.name.lower()}_file"
        path: Path | None = getattr(config, name)
        if path is None:
            continue
        for token in _read_tokens(f"serve.{name}", path, role):
            if token.digest in tokens:
                raise ConfigError(
                    f"serve.{name}: a token in {path} is listed twice, in this or another token file; list "
                    "each token once"
                )
            tokens[token.digest] = token
    return list(tokens.values())


def _read_tokens(name: str, path: Path, role: Role) -> list[Token]:
    """Read a file of tokens: one per line, optionally followed by an expiry time; # starts a comment."""
    tokens = []
    for number, line in enumerate(_read(name, path).decode("ascii", "replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{name}: {path}, line {number}"
        if len(words[0]) < MIN_TOKEN_LENGTH or not words[0].isascii():
            raise ConfigError(
                f"{where}: a token must have at least {MIN_TOKEN_LENGTH} characters, all of them ASCII, got "
                f"{len(words[0])} characters; create one with `openssl rand -hex 32`"
            )
        expires = None
        if len(words) > 1:
            try:  # the message does not quote the words, which may be another token
                expiry = datetime.fromisoformat(words[1] if len(words) == 2 else "")
            except ValueError:
                raise ConfigError(
                    f"{where}: only an expiry time, such as 2027-01-31T00:00:00Z, may follow the token; "
                    "correct or delete the rest of the line"
                ) from None
            expires = expiry.replace(tzinfo=expiry.tzinfo or UTC).timestamp()
        tokens.append(Token(hashlib.sha256(words[0].encode()).digest(), role, expires))
    if not tokens:
        raise ConfigError(f"{name}: {path} contains no token; write one per line, or remove the setting")
    return tokens


def read_certificates(config: ServeConfig) -> grpc.ServerCertificateConfiguration | None:
    """Read the configured certificates; None if none are configured. Raises ConfigError for invalid files."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    certificate = _read("serve.tls_certificate", config.tls_certificate)
    key = _read("serve.tls_key", config.tls_key)
    authority = None
    # Load the files with OpenSSL first: its error says what is wrong, whereas gRPC would only fail to listen.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"serve.tls_certificate, serve.tls_key: {config.tls_certificate} and {config.tls_key} must be a "
            f"certificate chain and its private key, in PEM format and not encrypted ({error})"
        ) from None
    if config.tls_client_ca is not None:
        authority = _read("serve.tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(config.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"serve.tls_client_ca: {config.tls_client_ca} must contain certificates in PEM format "
                f"({error})"
            ) from None
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{name}: {path} cannot be read ({error.strerror}); correct the path or its permissions"
        ) from None
