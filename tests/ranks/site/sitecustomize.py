"""Arms one failpoint in one rank of a test's group, or patches all; Python imports this first everywhere.

MASKWIRE_TEST_FAULT is RANK:NAME:COUNT:KIND:FILE. The COUNT-th time that the rank passes the failpoint it
kills itself (KIND kill), runs out of memory (memory) or hangs (hang), once: FILE marks that it happened.

MASKWIRE_TEST_PATCH names a function of `rank_patches` that each rank calls before it starts.
"""

import os
import signal
import threading
from pathlib import Path


def _arm() -> None:
    rank, name, count, kind, marker = os.environ["MASKWIRE_TEST_FAULT"].split(":")
    if os.environ.get("RANK") != rank:
        return
    if name.startswith("recovery.") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        return  # the first start has nothing to recover
    from maskwire_server import failpoints

    left = int(count)

    def act(place: str) -> None:
        nonlocal left
        if place != name or Path(marker).exists():
            return
        left -= 1
        if left <= 0:
            Path(marker).touch()
            if kind == "memory":
                raise MemoryError("out of memory, as a test wants it")
            if kind == "hang":
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.install(act)


if "MASKWIRE_TEST_FAULT" in os.environ:
    _arm()
if "MASKWIRE_TEST_PATCH" in os.environ and "RANK" in os.environ:
    import rank_patches

    getattr(rank_patches, os.environ["MASKWIRE_TEST_PATCH"])()
