"""Lets `python -m abtrain` run the `abtrain` command, for torchrun and for environments without that command."""

from abtrain.commands.cli import main

if __name__ == "__main__":
    main()
