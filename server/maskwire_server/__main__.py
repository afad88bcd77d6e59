"""`python -m maskwire_server`: the command where no script was installed, from a checkout for instance."""

from maskwire_server.cli import main

if __name__ == "__main__":
    main()
