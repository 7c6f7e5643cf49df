"""`abtrain lab`: runs a script on an emulated cluster and prints a table of the bytes that its hosts sent."""

from __future__ import annotations

from collections.abc import Sequence

from abtrain.commands.lab.arguments import LabRequest, parse_arguments
from abtrain.commands.lab.lab import Lab, clean
from abtrain.commands.lab.result import FILE, LabResult, as_table
from abtrain.commands.output import Output
from abtrain.commands.process import stopped_by_signals
from abtrain.commands.units import format_rate


def main(arguments: Sequence[str]) -> None:
    """Runs `abtrain lab`. The lab is always removed at the end, even after an error.

    Raises:
        ConfigurationError: the arguments are invalid, or this system cannot run a lab. The error lists all problems,
            and no lab was built.
        HostFailedError: a host failed. The error has the exit code of the host.
        LabError: the lab cannot be built, or the job took longer than its time-out.
        StoppedError: SIGINT, SIGTERM or SIGHUP was received.
    """
    request = parse_arguments(arguments)
    console = Output()
    if request.job is None:
        removed = clean()
        console.plain(f"removed {', '.join(removed)}" if removed else "there are no leftovers of labs")
        return
    with stopped_by_signals():
        _run(request, console)


def _run(request: LabRequest, console: Output) -> None:
    config, job = request.config, request.job
    assert job is not None
    with Lab(config) as lab:
        for host, (up, down) in enumerate(lab.measured):
            console.plain(f"host {host}: {config.address(host)}, up {format_rate(up)}, down {format_rate(down)}")

        def relay(host: int, line: str) -> None:
            if line.strip():
                console.plain(f"host {host} | {line}")

        result = lab.run(job, show=relay, check=False)
    show_result(result, console)
    console.plain(f"written to {job.out / FILE}")
    error = result.error()
    if error is not None:
        raise error


def show_result(result: LabResult, console: Output) -> None:
    """Prints the result of a job: its time, and what each host sent."""
    console.print(f"{result.seconds:.1f} s, {result.wire_bytes / 1e6:,.2f} MB sent per host\n")
    console.print(as_table(result))
