"""Run the command `maskwire-server` with `python -m maskwire_server`, for example in a source checkout."""

from maskwire_server.cli import main

if __name__ == "__main__":
    main()
