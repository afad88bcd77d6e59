"""The command `maskwire`, also as `python -m maskwire`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point."""
    # Until the command is there to end cleanly, which takes it half a second.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    # Read when grpc is imported: what its core would log, our errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire.cli import main as run

    run()


if __name__ == "__main__":
    main()
