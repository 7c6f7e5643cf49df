"""Runs the command that starts the workers of a run at full scale, and waits until all of them have ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from abtrain.commands.files import read_regular
from abtrain.commands.train.launch import FAILURE

_GRACE_SECONDS = 40.0
"""The time in which a launcher must end its workers after a request to stop. torchrun gives them 30 s to save."""


def exit_code_of(command: Sequence[str], failure: Path) -> int:
    """Runs a launcher and returns 0, or the exit code of the worker that failed first.

    torchrun exits with 1 after any error of a worker. Workers therefore also write their exit code to a file. If none
    of them could, the exit code is that of the launcher.

    Args:
        command: the command line.
        failure: the path of that file, in a folder that all workers see. It is removed afterwards.

    Raises:
        OSError: the command cannot be started.
        StoppedError: this process received a request to stop, and the launcher has ended.
    """
    failure.unlink(missing_ok=True)
    try:
        code = _finished(command, failure)
        return code and (_reported(failure) or code)
    finally:
        failure.unlink(missing_ok=True)


def _finished(command: Sequence[str], failure: Path) -> int:
    with subprocess.Popen(command, env={**os.environ, FAILURE: str(failure.absolute())}) as process:
        try:
            return process.wait()
        except BaseException:
            # Workers save their state after SIGTERM. Without a launcher they would train on, and nobody would notice.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            process.kill()
            raise


def _reported(failure: Path) -> int:
    """Returns the exit code in a worker's file; 0 if there is none."""
    try:
        return int(read_regular(failure))
    except (OSError, ValueError):
        return 0
