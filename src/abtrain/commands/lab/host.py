"""Runs torchrun on a host of a lab, and exits with the exit code of the worker that failed first.

The program is started as `python -m abtrain.commands.lab.host LAB ARGUMENTS...`. LAB is the process id of the lab, and
ARGUMENTS are the arguments of torchrun. The program is killed when the lab's process ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(lab: int, arguments: list[str]) -> int:
    """Runs torchrun, unless the process of the lab has already ended.

    Args:
        lab: the process id of the lab.
        arguments: the arguments of torchrun.

    Returns:
        0, or the exit code of the worker that failed first; 128 + N if signal N ended that worker.
    """
    # Linux kills this process when the lab's process ends. The next check covers an end before this call.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != lab:
        return 128 + signal.SIGKILL
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        print(f"worker {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
