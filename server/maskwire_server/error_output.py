"""The error that ends a command, as its user or a collector of logs reads it."""

from __future__ import annotations

import logging
import sys

from maskwire_server.telemetry.log_formats import writes_json

log = logging.getLogger(__name__)


def say(error: object) -> None:
    """Write an error to stderr, one line per problem; to the log if it is JSON."""
    for line in str(error).splitlines():
        if writes_json():
            log.critical("%s", line)
        else:
            print(f"maskwire-server: {line}", file=sys.stderr)
