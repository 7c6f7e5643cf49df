"""The commands of a run, one on each host: their output, their ends, and who failed first."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from abtrain.commands.lab import namespaces
from abtrain.errors import PeerLostError

Show = Callable[[int, str], None]
"""What is done with a line that a host's command prints: (host, line)."""

_GRACE_SECONDS = 1.0  # in which the hosts that a failure takes along are waited for
_STOP_SECONDS = 3.0  # that commands have to end by themselves
# A worker that lost another one, or that its launcher ended, was not the first to fail.
_CONSEQUENCES = (PeerLostError.exit_code, 128 + signal.SIGTERM)


class HostProcesses:
    """One command on each host.

    Args:
        names: the hosts' namespaces.
        out: the folder that gets the output, as host-0.log and so on.
        show: gets the output too.

    Attributes:
        killed: hosts that were killed as a fault: they have not failed.
    """

    def __init__(self, names: Sequence[str], out: Path, show: Show) -> None:
        self.killed: set[int] = set()
        self._names, self._out, self._show = names, out, show
        self._ends: dict[int, float] = {}  # host: seconds; in the order in which hosts ended
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the command of the next host, with exactly this environment and the mark of its namespace."""
        host = len(self._processes)
        process = subprocess.Popen(
            ("ip", "netns", "exec", self._names[host], *command),
            env={**environment, namespaces.MARK: self._names[host]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends all hosts in order
        )
        log = self._out / f"host-{host}.log"
        reader = threading.Thread(target=_read, args=(host, process, log, self._show), daemon=True)
        reader.start()
        self._processes.append(process)
        self._readers.append(reader)

    def running(self) -> bool:
        """Whether a command has not ended yet."""
        for host, process in enumerate(self._processes):
            if host not in self._ends and process.poll() is not None:
                self._ends[host] = time.monotonic()
        return len(self._ends) < len(self._processes)

    def failed(self) -> bool:
        """Whether a host has failed, and those that it takes along have had the time to."""
        failures = self._failures()
        return bool(failures) and time.monotonic() - self._ends[failures[0]] > _GRACE_SECONDS

    def first_failed(self) -> int | None:
        """The host to blame, if any failed: the first that was neither killed as a fault nor taken along by others."""
        failures = self._failures()
        return min(failures, key=lambda host: self.exit_code(host) in _CONSEQUENCES, default=None)

    def ended(self, host: int) -> float:
        """When a command ended that has, on the monotonic clock."""
        return self._ends[host]

    def exit_code(self, host: int) -> int:
        """Returns the exit code of a command that has ended; 128 plus the signal's number after a signal."""
        code = self._processes[host].returncode
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ends what still runs on any host, and waits for the last of its output."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        namespaces.kill_all(self._names)
        for process in self._processes:
            process.kill()  # one that has not entered its namespace yet
            process.wait()
        for reader in self._readers:
            reader.join()

    def _failures(self) -> list[int]:
        return [host for host in self._ends if self.exit_code(host) != 0 and host not in self.killed]


def _read(host: int, process: subprocess.Popen[str], log: Path, show: Show) -> None:
    assert process.stdout is not None
    with process.stdout, log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            show(host, line.rstrip("\n"))
