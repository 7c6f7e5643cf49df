"""Runs the `abtrain` command as `python -m abtrain`, for torchrun and environments without the script."""

from abtrain.commands.cli import main

if __name__ == "__main__":
    main()
