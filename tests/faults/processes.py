"""Runs of the command as real processes, which can be killed and frozen, without the seconds that imports take.

    ended = start(folder, "train", "ab", "--workers", "2", plan="kill 1 7 step").wait()

The command and its workers are forked from a process that has imported everything. All else is as for users: the
launcher starts, watches and restarts its workers, which meet through files and talk over the loopback device.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from abtrain import failpoints as faults
from abtrain.comm import peers
from abtrain.commands.cli import main
from abtrain.commands.process import end_at_once
from abtrain.commands.train import launcher, worker
from tests import forks

GRACE_SECONDS = 3
# For the word of workers that have ended, which all others of this machine do at about the same time.
WORD_SECONDS = 0.5
# For workers that save before they end, which takes long on a busy machine.
SAVING_SECONDS = 60


class Ended(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Running:
    """A command that is running in a folder."""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self.process = process
        self._folder = folder

    def wait(self, seconds: float = 240) -> Ended:
        """Waits for its end; kills it if it takes longer."""
        self.process.join(seconds)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        out, err = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        assert not late, f"it did not end in {seconds} s: {out}{err}"
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, out, err)

    def workers(self) -> list[int]:
        """Returns the process ids of its workers that are running."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdecimal() and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(
                    self.process.pid
                ):
                    found.append(int(entry.name))
        return sorted(found)

    def signal_all(self, number: int) -> None:
        """Sends a signal to the command and to every worker, as schedulers do."""
        assert self.process.pid is not None
        for pid in (*self.workers(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_for(self, path: Path, seconds: float = 100) -> None:
        """Waits until a file is not empty."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.stat().st_size):
            assert self.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Sends a signal to the command's session, as a terminal does; workers have sessions of their own."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)


def start(
    folder: Path,
    *arguments: str,
    plan: str = "",
    environment: Mapping[str, str] | None = None,
    grace: int = GRACE_SECONDS,
    read: bool = True,
) -> Running:
    """Starts `abtrain` with these arguments.

    Args:
        folder: where it runs; its output goes to the files stdout and stderr there.
        arguments: of the command.
        plan: of faults.
        environment: variables beside those of this process.
        grace: seconds for workers to end by themselves before they are killed; the command's default is longer.
        read: whether its standard output goes to a file, rather than to a pipe that nobody reads.
    """
    launched = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in launched}
    variables |= {faults.VARIABLE: plan, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = forks.context().Process(target=_command, args=(folder, arguments, variables, grace, read))
    process.start()
    return Running(process, folder)


def _command(folder: Path, arguments: tuple[str, ...], variables: dict[str, str], grace: int, read: bool) -> None:
    os.setsid()
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), descriptor)
    if not read:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    os.environ.clear()
    os.environ.update(variables)
    faults.load()
    SubprocessHandler._popen = lambda handler, program, variables: _Worker(program, variables)  # type: ignore[method-assign]
    # Names events in torch's log by inspecting the whole stack, which takes longer than all else in the launcher.
    dynamic_rendezvous.get_method_name = lambda depth=2: "rendezvous"
    launcher._SHUTDOWN_SECONDS = grace
    peers._WAIT_SECONDS = WORD_SECONDS
    main(arguments)


class _Worker:
    """Replaces subprocess.Popen in the launcher: the worker is a fork, not a new program."""

    def __init__(self, program: tuple[str, ...], variables: dict[str, str]) -> None:
        # daemon: a launcher that is stopped while it starts a worker does not wait for it.
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_work, args=(program[-1], variables), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        while self._process.exitcode is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # the launcher signals all of a worker's session

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._process.exitcode


def _work(folder: str, variables: dict[str, str]) -> None:
    # A new program would not inherit the launcher's handlers of signals and logs.
    logging.getLogger("abtrain").handlers.clear()
    end_at_once()
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    faults.load()
    code = worker.main(Path(folder))
    if code:
        sys.exit(code)
