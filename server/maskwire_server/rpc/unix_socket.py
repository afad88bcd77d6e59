"""A Unix socket that only its owner can open."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

import grpc

from maskwire_server.errors import ConfigError

LONGEST_PATH = 100  # bytes: the kernel takes 107 (Linux) or 103 (macOS)


class Socket:
    """The file of a socket, bound for a server."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._bound = False

    def bind(self, server: grpc.Server) -> None:
        """Have the server listen on it, mode 0600. Raises ConfigError."""
        name = os.fsencode(self._path)
        if len(name) > LONGEST_PATH:
            raise ConfigError(
                f"Unix socket: the path must have at most {LONGEST_PATH} bytes, {self._path} has {len(name)}"
            )
        if not str(self._path).isprintable():  # what is not UTF-8 too; the ready line holds it
            raise ConfigError(f"Unix socket: the path must be printable UTF-8, got {name!r}")
        if set("?#%") & set(str(self._path)):  # gRPC reads an address as a URI
            raise ConfigError(f"Unix socket: the path must do without ?, # and %, got {self._path}")
        self._refuse_taken()
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mask = os.umask(0o177)  # from the first moment on: a chmod afterwards would come too late
        try:
            bound = bool(server.add_insecure_port(f"unix:{self._path}"))
        except RuntimeError:
            bound = False
        finally:
            os.umask(mask)
        if not bound:
            raise ConfigError(f"Unix socket: cannot listen on {self._path}; is its folder writable?")
        self._bound = True

    def _refuse_taken(self) -> None:
        """gRPC replaces what is there, which must be nobody else's."""
        try:
            if not stat.S_ISSOCK(self._path.stat().st_mode):
                raise ConfigError(f"Unix socket: {self._path} exists and is no socket; choose another path")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError):
            return  # nothing, or what a killed server left
        except OSError as error:
            raise ConfigError(
                f"Unix socket: {self._path} cannot be used ({error.strerror or error})"
            ) from None
        raise ConfigError(f"Unix socket: another server listens on {self._path}; choose another path")

    def remove(self) -> None:
        """Take the file away, once the server has stopped."""
        if self._bound:
            self._path.unlink(missing_ok=True)
