"""Runs one job in a lab: starts it, injects its faults, counts bytes, and waits until it has ended."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable

from abtrain.commands.files import write_json
from abtrain.commands.lab.counters import Sampler
from abtrain.commands.lab.faults import Action, Event, faults_in_words, timeline
from abtrain.commands.lab.job import LAUNCHER_FOLDER, Job, host_command, host_environment
from abtrain.commands.lab.network import Network
from abtrain.commands.lab.processes import SAVE_SECONDS, HostProcesses, Show
from abtrain.commands.lab.result import FILE, HostResult, LabResult, as_record

_POLL_SECONDS = 0.02


class LabRun:
    """A job that is running on all hosts of a lab.

    Args:
        network: the network of the lab, which must have been built.
        job: a valid job.
        measured: the measured rates (up, down) of each host's link, in bits per second.
        act: a function that carries out an action of a fault and calls `note`.
        show: a function that is called with (host, line) for each line that a host prints.
        cut_off: the hosts whose links are already cut.
    """

    def __init__(
        self,
        network: Network,
        job: Job,
        measured: list[tuple[float, float]],
        act: Callable[[Action], None],
        show: Show,
        cut_off: Iterable[int] = (),
    ) -> None:
        self._network, self._job, self._measured, self._act = network, job, measured, act
        self._show = show
        self._rates = list(network.rates)
        self._events: list[Event] = [Event(-1.0, "cut", host) for host in cut_off]
        hosts = range(network.config.nodes)
        job.out.mkdir(parents=True, exist_ok=True)
        self._sampler = Sampler([network.open_counters(host) for host in hosts], time.monotonic())
        self._started = time.monotonic()
        self.processes = HostProcesses(network.hosts, job.out, show)
        try:
            for host in hosts:
                self.processes.start(host_command(job, network.config, host), host_environment(job, host))
        except BaseException:
            self.close()
            raise

    def finish(self) -> LabResult:
        """Waits until the command has ended on all hosts, a host has failed, or the time-out has passed. Then ends all.

        Returns:
            The result of the job, which is also written to lab.json, even if a signal stops the lab.
        """
        complete, stopped = True, True
        try:
            complete = self._follow()
            stopped = False
        finally:
            seconds = self._elapsed()
            if stopped:
                for host in self.processes.stop(SAVE_SECONDS):
                    self._show(host, f"killed, since it did not end within {SAVE_SECONDS:.0f} s of the request to stop")
            self.processes.stop()
            result = self._result(seconds, complete, stopped)
            write_json(self._job.out / FILE, as_record(result, self._network.config))
        return result

    def note(self, verb: str, host: int, rate: int | None = None) -> None:
        """Records an action on a host, whose cause is a fault of the job or a call of a method of the lab."""
        self._events.append(Event(self._elapsed(), verb, host, rate))

    def close(self) -> None:
        """Ends the job's processes, and removes its temporary files."""
        self.processes.stop()
        self._sampler.close()
        shutil.rmtree(self._job.out / LAUNCHER_FOLDER, ignore_errors=True)

    def _follow(self) -> bool:
        """Injects faults until the job ends. Returns False if the job takes longer than its time-out."""
        actions = timeline(self._job.faults)
        while self.processes.running() and not self.processes.failed():
            elapsed = self._elapsed()
            if self._job.timeout is not None and elapsed > self._job.timeout:
                return False
            while actions and actions[0].at <= elapsed:
                self._act(actions.pop(0))
            self._sampler.sample(time.monotonic())
            time.sleep(_POLL_SECONDS)
        return True

    def _result(self, seconds: float, complete: bool, stopped: bool) -> LabResult:
        hosts = [
            HostResult(
                host=host,
                address=self._network.config.address(host),
                rate=self._rates[host],
                measured_up=self._measured[host][0],
                measured_down=self._measured[host][1],
                traffic=traffic,
                exit_code=self.processes.exit_code(host),
                killed=host in self.processes.killed,
            )
            for host, traffic in enumerate(self._sampler.totals())
        ]
        failed = self.processes.first_failed()
        until = seconds if failed is None else self.processes.ended(failed) - self._started
        return LabResult(
            command=self._job.command,
            out=self._job.out,
            seconds=seconds,
            timed_out=not complete,
            stopped=stopped,
            hosts=tuple(hosts),
            events=tuple((event.seconds, str(event)) for event in self._events if event.seconds >= 0),
            failed_host=failed,
            congestion_control=self._network.congestion_control(),
            caused=tuple(faults_in_words(self._events, until)),
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started
