"""The command `maskwire`, also as `python -m maskwire`."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point."""
    # Read when grpc is imported: what its core would log, our errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire.cli import main as run

    run()


if __name__ == "__main__":
    main()
