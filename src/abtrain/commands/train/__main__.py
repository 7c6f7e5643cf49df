"""`python -m abtrain.commands.train FOLDER`: the program of a worker that `launcher.py` starts; see `worker.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from abtrain.commands.process import end_at_once, leave


def main() -> None:
    """Trains as one worker, and ends the process with the worker's exit code."""
    # Imports take seconds. There is nothing to save before training begins, so a request to stop ends the process.
    end_at_once()

    from abtrain.commands.train import worker

    leave(worker.main(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
