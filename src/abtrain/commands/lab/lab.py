"""Builds an emulated cluster, runs jobs in it, injects faults, and removes it.

with Lab(LabConfig(nodes=4, rates=(100_000_000,))) as lab:
    result = lab.run(Job(("train.py", "--steps", "100"), out=Path("runs/lab")))
print(result.wire_bytes, result.seconds)
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
from types import TracebackType

from abtrain.commands.lab import namespaces
from abtrain.commands.lab.config import LabConfig, config_problems, system_problems
from abtrain.commands.lab.faults import Action
from abtrain.commands.lab.job import Job, job_problems
from abtrain.commands.lab.measure import verify_links
from abtrain.commands.lab.network import Network
from abtrain.commands.lab.processes import Show
from abtrain.commands.lab.result import LabResult
from abtrain.commands.lab.run import LabRun
from abtrain.errors import ConfigurationError, LabError

log = logging.getLogger("abtrain")

_WATCHER = "abtrain.commands.lab.watcher"


def clean() -> list[str]:
    """Removes leftovers of labs whose process has ended, and returns the names of the removed labs.

    Raises:
        ConfigurationError: this system cannot run labs.
        LabError: some leftovers cannot be removed. All other leftovers are removed.
    """
    problems = system_problems()
    if problems:
        raise ConfigurationError(problems)
    removed, errors = [], []
    for prefix in namespaces.dead_labs():
        try:
            namespaces.remove_lab(prefix)
            removed.append(prefix)
        except LabError as error:
            errors.append(str(error))
    if errors:
        raise LabError("\n".join(errors))
    return removed


class Lab:
    """An emulated cluster that exists inside a `with` block and runs one job at a time.

    Another thread may call methods such as `cut` while a job runs, to cause further faults.

    Args:
        config: the settings of the hosts and links.

    Attributes:
        measured: the last measured rates (up, down) of each host's link in bits per second.
    """

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        self.measured: list[tuple[float, float]] = []
        self._network: Network
        self._watcher: subprocess.Popen[bytes]
        self._run: LabRun | None = None
        self._cut_off: set[int] = set()

    def __enter__(self) -> Lab:
        """Removes leftovers of labs whose process has ended, builds this lab, and measures its links.

        Raises:
            ConfigurationError: settings are invalid, or this system cannot run a lab. The error lists all problems.
            LabError: the lab cannot be built, or a link does not have its configured rate.
        """
        problems = [*config_problems(self.config), *system_problems()]
        if problems:
            raise ConfigurationError(problems)
        try:
            clean()
        except LabError as error:  # leftovers of other labs do not disturb this one
            log.warning("%s", error)
        self._network = Network(self.config)
        self._network.check_name()
        self._watcher = _start_watcher(self._network.prefix)
        try:
            self._network.build()
            self.measure()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(self, job: Job, *, show: Show = lambda host, line: None, check: bool = True) -> LabResult:
        """Runs a command on every host, and waits until it has ended on all of them.

        If a fault changes the rate of a link, the new rate remains after the job.

        Args:
            job: the command and its faults.
            show: a function that is called with (host, line) for each line that a host prints. Each host has a thread
                of its own for these calls.
            check: whether to raise the error of a failed job.

        Raises:
            ConfigurationError: the job is invalid. The error lists all problems.
            HostFailedError: a host failed. The commands of all hosts have ended.
            LabError: the job took longer than its time-out. The commands of all hosts have ended.
        """
        problems = job_problems(job, self.config.nodes)
        if problems:
            raise ConfigurationError(problems)
        self._run = LabRun(self._network, job, self.measured, self._act, show, sorted(self._cut_off))
        try:
            result = self._run.finish()
        finally:
            self._run.close()
            self._run = None
        error = result.error()
        if check and error is not None:
            raise error
        return result

    @property
    def rates(self) -> list[int]:
        """The current rate setting of each host's link, in bits per second."""
        return list(self._network.rates)

    def measure(self) -> list[tuple[float, float]]:
        """Measures the rates of all links, and stores them in `measured`. No job may run during the measurement.

        Raises:
            LabError: a link does not have its configured rate.
        """
        self.measured = verify_links(self._network)
        return self.measured

    def cut(self, host: int) -> None:
        """Cuts a host off from the network."""
        self._note("cut", host)
        self._network.set_link(host, up=False)
        self._cut_off.add(host)

    def join(self, host: int) -> None:
        """Reconnects a host that was cut off."""
        self._note("join", host)
        self._network.set_link(host, up=True)
        self._cut_off.discard(host)

    def freeze(self, host: int) -> None:
        """Suspends all processes of a host."""
        self._note("freeze", host)
        names = (self._network.hosts[host],)
        # Processes that are not suspended yet may start new ones, so this repeats until there are none.
        before: list[int] = []
        while (reached := namespaces.signal_all(names, signal.SIGSTOP)) != before:
            before = reached

    def thaw(self, host: int) -> None:
        """Resumes the processes of a frozen host."""
        self._note("thaw", host)
        namespaces.signal_all((self._network.hosts[host],), signal.SIGCONT)

    def kill(self, host: int) -> None:
        """Kills all processes of a host. The job fails only if other hosts fail."""
        self._note("kill", host)
        if self._run is not None:
            self._run.processes.killed.add(host)
        namespaces.kill_all((self._network.hosts[host],))

    def change(self, host: int, rate: int) -> None:
        """Sets the rate of a host's link in both directions, in bits per second."""
        self._note("change", host, rate)
        self._network.set_rate(host, rate)

    def _act(self, action: Action) -> None:
        host, rate = action.fault.host, action.fault.rate
        if rate is not None:
            self.change(host, rate)
            return
        {"cut": self.cut, "join": self.join, "freeze": self.freeze, "thaw": self.thaw, "kill": self.kill}[action.verb](
            host
        )

    def _note(self, verb: str, host: int, rate: int | None = None) -> None:
        """Records an action in the running job, before the action begins: it may cause other hosts to fail."""
        if self._run is not None:
            self._run.note(verb, host, rate)

    def _remove(self) -> None:
        try:
            self._network.remove()
        finally:
            _stop_watcher(self._watcher)


def _start_watcher(prefix: str) -> subprocess.Popen[bytes]:
    """Starts a process that removes the lab if this process dies. It has its own session, so Ctrl-C does not end it."""
    return subprocess.Popen(
        (sys.executable, "-m", _WATCHER, prefix),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _stop_watcher(watcher: subprocess.Popen[bytes]) -> None:
    """Stops the watcher process after it has removed any leftovers of the lab."""
    assert watcher.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # somebody killed it
        watcher.stdin.write(b"removed\n")
        watcher.stdin.close()
    watcher.wait()
