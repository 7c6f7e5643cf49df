"""Represents the result of a job in a lab as data, as lab.json, and as a table."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from abtrain.commands.circumstances import hardware, versions
from abtrain.commands.lab.config import LabConfig
from abtrain.commands.lab.counters import SAMPLE_SECONDS, HostTraffic
from abtrain.commands.lab.measure import WIRE_SHARE
from abtrain.commands.lab.network import INTERFACE, LATENCY, burst_bytes
from abtrain.commands.output import narrow_table
from abtrain.commands.units import format_rate
from abtrain.errors import HostFailedError, LabError

FILE = "lab.json"


@dataclass(frozen=True)
class HostResult:
    """The result of a job on one host.

    Attributes:
        host: the number of the host.
        address: the IP address of the host in the lab's network.
        rate: the configured rate of its link at the start, in bits per second.
        measured_up, measured_down: the measured rates of its link before the job, in bits per second.
        traffic: the traffic of its network interface.
        exit_code: the exit code of its command; 128 + N if signal N ended the command.
        killed: whether a fault killed the processes of the host.
    """

    host: int
    address: str
    rate: int
    measured_up: float
    measured_down: float
    traffic: HostTraffic
    exit_code: int
    killed: bool


@dataclass(frozen=True)
class LabResult:
    """The result of a job in a lab.

    Attributes:
        command: the command that all hosts ran.
        out: the folder with lab.json and the output of the hosts.
        seconds: the seconds from the start of the job until the command of the last host ended.
        timed_out: whether the job was stopped because it took longer than its time-out.
        hosts: the results of all hosts, in the order of their numbers.
        events: (seconds, description) of the beginning and the end of each fault, in chronological order.
        failed_host: the host that failed first; None if none failed.
        congestion_control: the name of the TCP congestion control on the hosts.
        caused: descriptions of the faults before the first failure or the time-out.
        stopped: whether a signal to the lab ended the job.
    """

    command: tuple[str, ...]
    out: Path
    seconds: float
    timed_out: bool
    hosts: tuple[HostResult, ...]
    events: tuple[tuple[float, str], ...]
    failed_host: int | None
    congestion_control: str
    caused: tuple[str, ...] = ()
    stopped: bool = False

    def error(self) -> LabError | None:
        """Returns the error of a failed job, or None after success. It lists faults that may be the cause."""
        faults = f". Before that, {', and '.join(self.caused)}" if self.caused else ""
        if self.failed_host is not None:
            code = self.hosts[self.failed_host].exit_code
            log = self.out / f"host-{self.failed_host}.log"
            return HostFailedError(f"host {self.failed_host} failed with exit code {code}: see {log}{faults}", code)
        if self.timed_out:
            return LabError(
                f"the command did not end within {self.seconds:.0f} s and was stopped: see {self.out}, or use a "
                f"longer --timeout{faults}"
            )
        return None

    @property
    def wire_bytes(self) -> float:
        """The mean number of bytes that a host sent."""
        return sum(host.traffic.tx_bytes for host in self.hosts) / len(self.hosts)


def as_record(result: LabResult, config: LabConfig) -> dict[str, Any]:
    """Returns the content of lab.json. Rates are in bits per second, sizes in bytes, and times in seconds."""
    return {
        "command": list(result.command),
        "nodes": config.nodes,
        "workers_per_node": config.workers_per_node,
        "seconds": round(result.seconds, 3),
        "timed_out": result.timed_out,
        "stopped": result.stopped,
        "failed_host": result.failed_host,
        "hosts": [_host_record(host) for host in result.hosts],
        "events": [{"seconds": round(seconds, 3), "event": event} for seconds, event in result.events],
        "link": {
            "shaping": f"tbf at both ends, latency {LATENCY}",
            "congestion_control": result.congestion_control,
            "burst_bytes": [burst_bytes(host.rate) for host in result.hosts],
            "payload_share": round(WIRE_SHARE, 4),
            "tolerance": config.tolerance,
        },
        "counters": {"interface": INTERFACE, "sample_seconds": SAMPLE_SECONDS},
        "versions": {**versions(), "kernel": platform.release(), "iproute2": _iproute2()},
        "hardware": hardware(),
    }


def as_table(result: LabResult) -> Table:
    """Returns a table with a row for each host."""
    table = narrow_table()
    for column in ("host", "link", "sent MB", "received MB", "peak sent", "peak received", "exit code"):
        table.add_column(column, justify="right")
    for host in result.hosts:
        traffic = host.traffic
        table.add_row(
            str(host.host),
            format_rate(host.rate),
            f"{traffic.tx_bytes / 1e6:,.3f}",
            f"{traffic.rx_bytes / 1e6:,.3f}",
            format_rate(traffic.peak_tx),
            format_rate(traffic.peak_rx),
            f"{host.exit_code} (killed)" if host.killed else str(host.exit_code),
        )
    return table


def _host_record(host: HostResult) -> dict[str, Any]:
    record = asdict(host)
    traffic = record.pop("traffic")
    rounded = {name: round(record[name]) for name in ("measured_up", "measured_down")}
    return {**record, **rounded, **{name: round(value) for name, value in traffic.items()}}


def _iproute2() -> str:
    said = subprocess.run(["ip", "-V"], capture_output=True, text=True).stdout
    return said.strip().rpartition(" ")[2].rstrip(",")
