"""Addresses of the hosts that share a run."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import logging
import os
import socket
import struct
import time

from maskwire_server.errors import ConfigError

log = logging.getLogger(__name__)

_NAME_SECONDS = 60.0
_CONNECT_SECONDS = 5.0
_SIOCGIFADDR = 0x8915


def is_here(host: str) -> bool:
    """Whether a host name belongs to this host, so that a socket can be bound to it."""
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return True


def towards(host: str) -> str:
    """The address of this host from which it reaches `host`. Raises ConfigError if it cannot.

    Retries for a minute if the name does not resolve: a pod may start before the name of the leader's pod
    exists.
    """
    until = time.monotonic() + _NAME_SECONDS
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        while True:
            try:
                probe.connect((host, 9))  # sends nothing
                break
            except OSError as error:
                if isinstance(error, socket.gaierror) and time.monotonic() < until:
                    time.sleep(1)
                    continue
                why = error.strerror or str(error)
                raise ConfigError(
                    f"--rendezvous: {host} cannot be reached ({why}); check the name"
                ) from error
        address: str = probe.getsockname()[0]
        return address


def check_name(host: str) -> None:
    """Raise ConfigError if a name resolves to a loopback address, which other hosts cannot reach.

    Debian's installer gives a host's own name such an address. A numeric loopback address is accepted.
    """
    found = socket.gethostbyname(host)
    if found != host and ipaddress.ip_address(found).is_loopback:
        raise ConfigError(
            f"--rendezvous: {host} must not be a loopback address, got {found}; give its address in the "
            "network of the hosts"
        )


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if this host, the leader's, cannot listen on the port of the rendezvous."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(
            f"--rendezvous: port {port} of {host} cannot be used ({why}); give another port, the same on "
            "every host"
        ) from error


def wait_for(host: str, port: int) -> None:
    """Wait until the leader's host listens on a port; torch's launcher would give up after two minutes."""
    said = False
    while True:
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
            return
        except OSError as error:
            if not said:
                log.info("waiting for %s:%d (%s)", host, port, error.strerror or error)
            said = True
            time.sleep(1)


def interface(address: str) -> str | None:
    """The name of the network interface that has an address; None if there is none. Linux only."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
