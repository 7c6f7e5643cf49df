"""Runs the processes of a job, one on each host, collects their output, and finds the host that failed first."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from abtrain.commands.lab import namespaces
from abtrain.errors import PeerLostError

Show = Callable[[int, str], None]
"""A function that is called with (host, line) for each line that a host's command prints."""

_GRACE_SECONDS = 1.0  # after the first failure, for the hosts that fail because of it
_STOP_SECONDS = 3.0  # for commands to end by themselves after SIGTERM
SAVE_SECONDS = 30.0
"""The same if the user stops the lab. Workers may agree to stop, and save; torchrun gives them as long."""
# Exit codes of workers that lost a peer, or that their launcher ended: they were not the first to fail.
_CONSEQUENCES = (PeerLostError.exit_code, 128 + signal.SIGTERM)


class HostProcesses:
    """The processes of one command, one on each host.

    Args:
        names: the namespaces of the hosts.
        out: the folder for the output files host-0.log, host-1.log and so on.
        show: a function that is called with (host, line) for each line of the output.

    Attributes:
        killed: the hosts that a fault has killed. They do not count as failed.
    """

    def __init__(self, names: Sequence[str], out: Path, show: Show) -> None:
        self.killed: set[int] = set()
        self._names, self._out, self._show = names, out, show
        self._ends: dict[int, float] = {}  # the time at which each host's command ended, in chronological order
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the command of the next host. Its environment also has a variable with the host's namespace."""
        host = len(self._processes)
        process = subprocess.Popen(
            ("ip", "netns", "exec", self._names[host], *command),
            env={**environment, namespaces.MARK: self._names[host]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which ends all hosts in order
        )
        log = self._out / f"host-{host}.log"
        reader = threading.Thread(target=_read, args=(host, process, log, self._show), daemon=True)
        reader.start()
        self._processes.append(process)
        self._readers.append(reader)

    def running(self) -> bool:
        """Whether any command still runs."""
        for host, process in enumerate(self._processes):
            if host not in self._ends and process.poll() is not None:
                self._ends[host] = time.monotonic()
        return len(self._ends) < len(self._processes)

    def failed(self) -> bool:
        """Whether a host has failed, and other hosts have had time to fail as a consequence."""
        failures = self._failures()
        return bool(failures) and time.monotonic() - self._ends[failures[0]] > _GRACE_SECONDS

    def first_failed(self) -> int | None:
        """Returns the host that failed first, or None. Hosts that failed because they lost a peer come last."""
        failures = self._failures()
        return min(failures, key=lambda host: self.exit_code(host) in _CONSEQUENCES, default=None)

    def ended(self, host: int) -> float:
        """Returns the time on the monotonic clock at which the command of a host ended."""
        return self._ends[host]

    def exit_code(self, host: int) -> int:
        """Returns the exit code of a host's command that has ended, or 128 + N if signal N ended it."""
        code = self._processes[host].returncode
        return code if code >= 0 else 128 - code

    def stop(self, seconds: float = _STOP_SECONDS) -> list[int]:
        """Ends all processes of all hosts, and waits until all their output is read.

        Returns:
            The hosts that did not end by themselves in so many seconds after SIGTERM, and were killed.
        """
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + seconds
        killed = []
        for host, process in enumerate(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                killed.append(host)
        namespaces.kill_all(self._names)
        for process in self._processes:
            process.kill()  # it may not have entered its namespace yet
            process.wait()
        for reader in self._readers:
            reader.join()
        return killed

    def _failures(self) -> list[int]:
        return [host for host in self._ends if self.exit_code(host) != 0 and host not in self.killed]


def _read(host: int, process: subprocess.Popen[str], log: Path, show: Show) -> None:
    assert process.stdout is not None
    with process.stdout, log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            show(host, line.rstrip("\n"))
