"""Checks a server's address before gRPC uses it, because gRPC misreads or retries an invalid address."""

from __future__ import annotations

import ipaddress
import os
import re

_EXAMPLE_HOST, _EXAMPLE_PORT = "127.0.0.1", 50051
_UNIX_PATH_BYTES = 107  # the most that fit in a socket's address
_RESOLVERS = {"unix", "unix-abstract", "ipv4", "ipv6", "dns", "vsock", "xds"}  # gRPC's own schemes
_XDS = ("GRPC_XDS_BOOTSTRAP", "GRPC_XDS_BOOTSTRAP_CONFIG")
_SECURE = {"https", "grpcs"}


def check_target(target: str) -> None:
    """Raise TypeError or ValueError for an invalid address, naming the address that was probably meant.

    Valid addresses are HOST:PORT, unix:PATH, and gRPC's own forms (`unix-abstract:`, `ipv4:`, `ipv6:`,
    `dns:///`, `vsock:` and `xds:///`).
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be a str such as HOST:PORT or unix:PATH, got {type(target).__name__}")
    if problem := _problem(target):
        raise ValueError(f"target must be HOST:PORT or unix:PATH, got {target!r}: {problem}")


def _problem(target: str) -> str:
    if not target.strip():
        return f"give the server's address, such as {_EXAMPLE_HOST}:{_EXAMPLE_PORT}"
    scheme, colon, rest = target.partition(":")
    if colon and scheme in _RESOLVERS:
        return _own(scheme, rest)
    if any(character.isspace() for character in target):
        return f"leave the space out: {''.join(target.split())}"
    if "://" in target:
        scheme, _, rest = target.partition("://")
        tls = ", with TLS (tls=True, --tls, or ca)" if scheme.lower() in _SECURE else ""
        return f"leave {scheme}:// out: {_right(rest.lstrip('/'))}{tls}"
    if re.search(r"[/?#\\]", target):
        return f"leave out everything after the port: {_right(target)}"
    return _host_port(target)


def _own(scheme: str, rest: str) -> str:
    path = rest.removeprefix("//")
    if scheme == "unix":
        if not path:
            return "the path is missing"
        size = len(os.fsencode(path))
        if size > _UNIX_PATH_BYTES:
            return f"a Unix socket's path has at most {_UNIX_PATH_BYTES} bytes, got {size}"
        if path != rest and not path.startswith("/"):
            return (
                f"gRPC takes the text between unix:// and the next / for a host: unix:/{path} or unix:{path}"
            )
    if scheme == "unix-abstract" and not rest:
        return "the name is missing: unix-abstract:NAME"
    if scheme in ("ipv4", "ipv6"):
        problems = (_literal(scheme, address) for address in path.lstrip("/").split(","))
        return next((problem for problem in problems if problem), "")
    if scheme == "dns":
        name = rest.rpartition("/")[2]
        return _host_port(name) if name else "the host is missing: dns:///HOST:PORT"
    if scheme == "vsock" and not re.fullmatch(r"(//?/?)?\d+:\d+", rest, re.ASCII):
        return "a vsock address is vsock:CID:PORT, two numbers"
    if scheme == "xds" and not (rest.startswith("///") and rest[3:] and any(map(os.environ.get, _XDS))):
        return f"xds:///NAME needs a configuration of xDS in {' or '.join(_XDS)}; give HOST:PORT without one"
    return ""


def _literal(scheme: str, address: str) -> str:
    """Return what is wrong with an address of an `ipv4:` or `ipv6:` target; empty if it is valid."""
    if problem := _host_port(address):
        return problem
    host = address.rpartition(":")[0]
    try:
        kind = ipaddress.IPv4Address if scheme == "ipv4" else ipaddress.IPv6Address
        kind(host.strip("[]"))
    except ValueError:
        return f"{scheme}: takes an address in numbers, not {host}; leave {scheme}: out: {address}"
    return ""


def _right(rest: str) -> str:
    """Return the HOST:PORT that a URL, or another text with an address, probably means."""
    place = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rpartition("@")[2]
    host, _, port = place.rpartition(":")
    if place and not _host_port(place):
        return place
    if host and not _host_port(f"{host}:{_EXAMPLE_PORT}"):
        place = host  # only the port is wrong
    if place and not _host_port(f"{place}:{_EXAMPLE_PORT}"):
        return f"{place}:{_EXAMPLE_PORT}, or its port"
    return f"{_EXAMPLE_HOST}:{port or _EXAMPLE_PORT}" if not _port(port) else "HOST:PORT"


def _host_port(text: str) -> str:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host):
            return f"an IPv6 address in brackets looks like [::1]:{_EXAMPLE_PORT}"
        if not rest.startswith(":"):
            return f"the port is missing: [{host}]:{_EXAMPLE_PORT}"
        return _port(rest[1:])
    host, colon, port = text.rpartition(":")
    if not colon:
        if text.isdigit():
            return f"the host is missing: {_EXAMPLE_HOST}:{text}"
        return f"the port is missing: {text}:{_EXAMPLE_PORT}"
    if not host:
        return f"the host is missing: {_EXAMPLE_HOST}:{port or _EXAMPLE_PORT}"
    if _is_ipv6(text):
        return f"the port is missing, and an IPv6 address must be in brackets: [{text}]:{_EXAMPLE_PORT}"
    if _is_ipv6(host):
        return f"an IPv6 address must be in brackets: [{host}]:{port}"
    if ":" in host:
        return "it has more than one port"
    return _port(port)


def _port(port: str) -> str:
    if not port:
        return f"the port is missing; the server's default is {_EXAMPLE_PORT}"
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        return f"the port must be 1 to 65535, not {port}"
    return ""


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
