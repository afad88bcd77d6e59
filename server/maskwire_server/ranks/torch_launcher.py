"""Runs torch's elastic launcher, torchrun. It ends without a traceback when it is told to stop."""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException

if __name__ == "__main__":
    try:
        run.main()
    except SignalException as stopped:  # it has ended its ranks
        sys.exit(128 + stopped.sigval)
