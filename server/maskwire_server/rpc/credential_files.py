"""The server's certificate and token files, which are read again when they change.

New connections get the new certificate, and new calls are checked against the new tokens. Existing
connections and running calls are not affected. If a new file is invalid, the previous content stays in use
and the log says what is wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.rpc import auth
from maskwire_server.rpc.call_events import Publish

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_SECONDS = 60.0
"""How often the files are checked for changes."""

_Signature = tuple[tuple[int, int, int] | None, ...]


class CredentialFiles:
    """The current certificates and tokens. One thread calls `refresh`; gRPC's threads call `_changed`."""

    def __init__(
        self,
        config: ServeConfig,
        clock: Callable[[], float] = time.monotonic,
        publish: Publish = lambda _: None,
    ) -> None:
        """Read the files. `publish` receives an event for each rejected call. Raises ConfigError."""
        self._clock = clock
        self._checked = clock()
        self._certificates = _Files(config.certificate_files, lambda: auth.read_certificates(config))
        self._tokens = _Files(config.token_files, lambda: auth.read_tokens(config))
        self._requires_client = config.tls_client_ca is not None
        self._served = self._certificates.content  # the certificates that gRPC was given last
        self.interceptor: auth.TokenInterceptor | None = None
        """Checks the tokens; None if the server requires no token."""
        if self._tokens.content:
            self.interceptor = auth.TokenInterceptor(
                self._tokens.content, auth.Role[config.download_role.upper()], publish=publish
            )

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """gRPC credentials that always use the current certificates; None if the server uses no TLS."""
        if self._served is None:
            return None
        changed: Any = self._changed  # Any, because grpc's stubs do not allow it to return None
        return grpc.dynamic_ssl_server_credentials(self._served, changed, self._requires_client)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificates if they have changed, else None. gRPC calls this before each TLS handshake."""
        content = self._certificates.content
        if content is self._served:
            return None
        self._served = content
        return content

    def refresh(self, *, now: bool = False) -> None:
        """Read changed files, at most once per CHECK_SECONDS. With `now`, read all files immediately."""
        if not now and self._clock() - self._checked < CHECK_SECONDS:
            return
        self._checked = self._clock()
        if self._certificates.refresh(now=now):
            log.info("read the certificates again: new connections use them")
        if self._tokens.refresh(now=now) and self.interceptor is not None:
            self.interceptor.replace(self._tokens.content)
            log.info("read the tokens again: %d are valid for new calls", len(self._tokens.content))


class _Files(Generic[T]):
    """Files that are read together, and their last valid content."""

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], T]) -> None:
        self._paths, self._read = paths, read
        self._signature = self._sign()
        self.content = read()

    def refresh(self, *, now: bool) -> bool:
        """Read the files if they have changed, or if `now` is set. Returns whether there is new content."""
        signature = self._sign()
        if not self._paths or (signature == self._signature and not now):
            return False
        try:
            content = self._read()
        except ConfigError as error:
            if self._sign() == signature:
                self._signature = signature  # so that the error is logged once
                log.error("%s; the previous certificates or tokens stay in use", error)
            return False
        if self._sign() != signature:  # they are being replaced: read them at the next check
            return False
        self._signature, self.content = signature, content
        return True

    def _sign(self) -> _Signature:
        """The time, size and inode of each file. The time alone may stay the same when a file is replaced."""
        return tuple(_sign(path) for path in self._paths)


def _sign(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
