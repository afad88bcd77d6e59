"""The command `maskwire`, which `python -m maskwire` also runs."""

from __future__ import annotations

import os
import signal
import sys

from maskwire import standard_streams


def main() -> None:
    """Run the command `maskwire`, and exit with its exit code."""
    # Importing the command takes half a second. These handlers serve until the command installs its own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    # grpc reads this variable when it is imported. Its core would otherwise log errors that the command
    # reports itself.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    standard_streams.protect()
    from maskwire.cli import exit_codes
    from maskwire.cli import main as run

    try:
        run()
    except SystemExit as end:
        code, words = standard_streams.finish(end.code)
        if words:
            exit_codes.show_error(words, code, as_json="--json" in sys.argv)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()
