"""`python -m abtrain.commands.train FOLDER`: a worker that `launch.py` started, see `worker.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from abtrain.commands.train.requests import end_at_once


def main() -> None:
    """Trains as a worker, and ends with its exit code."""
    # Imports take seconds. Until training begins there is nothing to save, and nothing to say either.
    end_at_once()

    from abtrain.commands.process import leave
    from abtrain.commands.train import worker

    leave(worker.main(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
