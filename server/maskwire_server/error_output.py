"""Writes the error that ends a command, for its user or for a log collector."""

from __future__ import annotations

import logging
import sys

from maskwire_server.telemetry.log_formats import writes_json

log = logging.getLogger(__name__)


def say(error: object) -> None:
    """Write an error to stderr, one line per problem; with JSON logging, write it to the log instead."""
    for line in str(error).splitlines():
        if writes_json():
            log.critical("%s", line)
        else:
            print(f"maskwire-server: {line}", file=sys.stderr)
