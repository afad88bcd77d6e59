"""A Unix domain socket to which only its owner can connect."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

import grpc

from maskwire_server.errors import ConfigError

MAX_PATH_BYTES = 100  # the kernel allows 107 (Linux) or 103 (macOS)


class UnixSocket:
    """The file of a Unix socket on which a server listens."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._bound = False

    def bind(self, server: grpc.Server) -> None:
        """Make the server listen on the socket file, created with mode 0600. Raises ConfigError."""
        name = os.fsencode(self._path)
        if len(name) > MAX_PATH_BYTES:
            raise ConfigError(
                f"Unix socket: the path must have at most {MAX_PATH_BYTES} bytes, got {len(name)} bytes: "
                f"{self._path}; choose a shorter path"
            )
        if not str(self._path).isprintable():  # the ready line contains it; also rejects invalid UTF-8
            raise ConfigError(f"Unix socket: the path must be printable UTF-8, got {name!r}; rename it")
        if set("?#%") & set(str(self._path)):  # gRPC parses an address as a URI
            raise ConfigError(
                f"Unix socket: the path must not contain ?, # or %, got {self._path}; choose another path"
            )
        self._check_free()
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mask = os.umask(0o177)  # not a chmod afterwards: others could connect until then
        try:
            bound = bool(server.add_insecure_port(f"unix:{self._path}"))
        except RuntimeError:
            bound = False
        finally:
            os.umask(mask)
        if not bound:
            raise ConfigError(
                f"Unix socket: cannot listen on {self._path}; check that its folder exists and is writable"
            )
        self._bound = True

    def _check_free(self) -> None:
        """Raise ConfigError if the path is in use, because gRPC would replace any file there."""
        try:
            if not stat.S_ISSOCK(self._path.stat().st_mode):
                raise ConfigError(
                    f"Unix socket: {self._path} exists and is not a socket; choose another path"
                )
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError):
            return  # no file, or one that a killed server left behind
        except OSError as error:
            raise ConfigError(
                f"Unix socket: {self._path} cannot be used ({error.strerror or error}); choose another path"
            ) from None
        raise ConfigError(f"Unix socket: another server listens on {self._path}; choose another path")

    def remove(self) -> None:
        """Delete the socket's file, after the server has stopped."""
        if self._bound:
            self._path.unlink(missing_ok=True)
