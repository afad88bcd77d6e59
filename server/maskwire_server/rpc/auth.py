"""The door: certificates, and tokens with roles, checked before a request's body is read."""

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
from maskwire_server.rpc.status import abort

SHORTEST_TOKEN = 16
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection."
_SERVICE = "/maskwire.v1.TrainingService/"


class Role(enum.IntEnum):
    """What a token may do; each may do what the ones before it may."""

    READ = 1
    TRAIN = 2
    ADMIN = 3


NEEDS: dict[str, Role] = {
    "GetStatus": Role.READ,
    "EvalLoss": Role.READ,
    "Generate": Role.READ,
    "ListCheckpoints": Role.READ,
    "ListSteps": Role.READ,
    "OpenSession": Role.TRAIN,
    "CloseSession": Role.TRAIN,
    "TrainStep": Role.TRAIN,
    "Checkpoint": Role.TRAIN,
    "RestoreCheckpoint": Role.ADMIN,
    "DeleteCheckpoint": Role.ADMIN,
    "DownloadCheckpoint": Role.ADMIN,  # unless serve.download_role says otherwise
}


@dataclass(frozen=True)
class Token:
    """A token by its hash: the token itself is not kept."""

    digest: bytes
    role: Role
    expires: float | None
    """Seconds since the epoch; None: never."""


class Gate(grpc.ServerInterceptor):
    """Lets a call in by its token: health and reflection too, which would read a body of any size.

    The refusing handler takes a stream, so that the body is never read: refusing 64 MiB in a unary
    handler costs 227 MiB, here 38 MiB.
    """

    def __init__(
        self, tokens: list[Token], download_role: Role, clock: Callable[[], float] = time.time
    ) -> None:
        self._tokens = tokens
        self._needs = {**NEEDS, "DownloadCheckpoint": download_role}
        self._clock = clock

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See `grpc.ServerInterceptor`."""
        try:
            self._check(handler_call_details.method, handler_call_details.invocation_metadata)
        except Refused as refusal:
            return _refusing(refusal)
        return continuation(handler_call_details)

    def _check(self, method: str, metadata: Any) -> None:
        needed = Role.READ
        if not method.startswith((_HEALTH, _REFLECTION)):
            needed = self._needs.get(method.removeprefix(_SERVICE), Role.ADMIN)
        sent = [value for key, value in metadata or () if key == "authorization"]
        scheme, _, token = (sent[0] if len(sent) == 1 else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(
                "UNAUTHENTICATED",
                "this server wants one 'authorization: Bearer TOKEN' in the call's metadata",
            )
        found = self._find(token.strip())
        if found is None:
            raise Refused("UNAUTHENTICATED", "the token is unknown to this server")
        if found.expires is not None and self._clock() >= found.expires:
            raise Refused("UNAUTHENTICATED", "the token has expired; ask for a new one")
        if found.role < needed:
            raise Refused(
                "PERMISSION_DENIED",
                f"{method.rpartition('/')[2]} takes a token of role {needed.name.lower()}, this one has "
                f"{found.role.name.lower()}",
                role=found.role.name.lower(),
                needed_role=needed.name.lower(),
            )

    def _find(self, token: str) -> Token | None:
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._tokens:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found


def _refusing(refusal: Refused) -> grpc.RpcMethodHandler[Any, Any]:
    def behave(_: object, context: grpc.ServicerContext) -> object:
        abort(context, refusal)

    return grpc.stream_stream_rpc_method_handler(behave)


def gate(config: ServeConfig) -> Gate | None:
    """The gate of a configuration; None when it names no token file. Raises ConfigError."""
    tokens: dict[bytes, Token] = {}
    for role in Role:
        name = f"token_{role.name.lower()}_file"
        path: Path | None = getattr(config, name)
        if path is None:
            continue
        for token in _read_tokens(f"serve.{name}", path, role):
            if token.digest in tokens:
                raise ConfigError(
                    f"serve.{name}: a token in {path} is in another place too; each has one role"
                )
            tokens[token.digest] = token
    return Gate(list(tokens.values()), Role[config.download_role.upper()]) if tokens else None


def _read_tokens(name: str, path: Path, role: Role) -> list[Token]:
    """The tokens of a file, one per line, each optionally followed by its expiry time; # begins a comment."""
    tokens = []
    for number, line in enumerate(_read(name, path).decode("ascii", "replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{name}: {path}, line {number}"
        if len(words[0]) < SHORTEST_TOKEN or not words[0].isascii():
            raise ConfigError(
                f"{where}: a token must have at least {SHORTEST_TOKEN} ASCII characters, it has "
                f"{len(words[0])}; make one with `openssl rand -hex 32`"
            )
        expires = None
        if len(words) > 1:
            try:
                moment = datetime.fromisoformat(words[1] if len(words) == 2 else "")
            except ValueError:
                raise ConfigError(
                    f"{where}: behind the token comes nothing, or when it expires (2027-01-31T00:00:00Z)"
                ) from None
            expires = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        tokens.append(Token(hashlib.sha256(words[0].encode()).digest(), role, expires))
    if not tokens:
        raise ConfigError(f"{name}: {path} holds no token")
    return tokens


def server_credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """TLS as configured; None for plaintext. Raises ConfigError for files that do not do."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    certificate = _read("serve.tls_certificate", config.tls_certificate)
    key = _read("serve.tls_key", config.tls_key)
    authority = None
    # OpenSSL says what is wrong with a file; gRPC would only fail to listen.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"serve.tls_certificate, serve.tls_key: {config.tls_certificate} and {config.tls_key} must be a "
            f"certificate chain and its private key, PEM, not encrypted ({error})"
        ) from None
    if config.tls_client_ca is not None:
        authority = _read("serve.tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(config.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"serve.tls_client_ca: {config.tls_client_ca} must hold certificates, PEM ({error})"
            ) from None
    return grpc.ssl_server_credentials([(key, certificate)], authority, authority is not None)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read ({error.strerror})") from None
