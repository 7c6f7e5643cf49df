"""`python -m abtrain`: the command, for torchrun and where no script is installed."""

from abtrain.commands.cli import main

if __name__ == "__main__":
    main()
