"""Arms one failpoint in one rank of a test's group; Python imports this first in every process.

MASKWIRE_TEST_FAULT is RANK:NAME:COUNT:FILE. The rank kills itself the COUNT-th time it passes the failpoint,
once: FILE marks that it happened.
"""

import os
import signal
from pathlib import Path


def _arm() -> None:
    rank, name, count, marker = os.environ["MASKWIRE_TEST_FAULT"].split(":")
    if os.environ.get("RANK") != rank:
        return
    from maskwire_server import failpoints

    left = int(count)

    def act(place: str) -> None:
        nonlocal left
        if place != name or Path(marker).exists():
            return
        left -= 1
        if left <= 0:
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.install(act)


if "MASKWIRE_TEST_FAULT" in os.environ:
    _arm()
