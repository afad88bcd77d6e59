"""`python -m maskwire_server` runs the command, for example from a checkout without an installed script."""

from maskwire_server.cli import main

if __name__ == "__main__":
    main()
