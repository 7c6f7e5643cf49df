"""Parses and validates the arguments of `abtrain lab`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from abtrain.commands.command_line import Parser, number, whole_number
from abtrain.commands.lab.config import LabConfig, config_problems, parse_link_rate, system_problems
from abtrain.commands.lab.faults import Kind, LabFault, form_of, parse_fault
from abtrain.commands.lab.job import Job, Launcher, job_problems
from abtrain.commands.units import format_rate, parse_all
from abtrain.errors import ConfigurationError

_EXAMPLES = """\
examples:
  abtrain lab --nodes 4 --rate 100mbit -- train.py --steps 100
  abtrain lab --rates 1gbit,100mbit --nodes 2 -- -m abtrain train ab_outer
  abtrain lab --cut 3@20s+10s --change 2@10s=20mbit -- train.py

lab.json lists the bytes that passed the hosts' interfaces. The time of a fault counts from the start of the script."""


@dataclass(frozen=True)
class LabRequest:
    """The lab and the job that a command line describes.

    Attributes:
        config: the settings of the lab.
        job: the job to run in the lab; None if the command only removes leftovers of labs whose process has ended.
    """

    config: LabConfig
    job: Job | None


def parse_arguments(arguments: Sequence[str]) -> LabRequest:
    """Parses a command line, and checks that this system can run a lab.

    Raises:
        ConfigurationError: the arguments are invalid, or this system cannot run a lab. The error lists all problems.
        SystemExit: --help, or an unknown option.
    """
    own = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = _parser().read(arguments[:own])
    if given.clean:
        return LabRequest(LabConfig(), None)
    problems: list[str] = []
    texts = given.rates.split(",") if given.rates else [given.rate]
    rates = tuple(parse_all(texts, parse_link_rate, problems))
    # The other checks need valid rates. If one cannot be parsed, they use the default.
    config = LabConfig(given.nodes, LabConfig.rates if problems else rates, given.workers_per_node, given.network)
    faults: list[LabFault] = []
    for kind in get_args(Kind):
        faults += parse_all(getattr(given, kind), functools.partial(parse_fault, kind), problems)
    out = given.out or Path("runs") / f"lab-{time.strftime('%Y%m%d-%H%M%S')}"
    job = Job(tuple(arguments[own + 1 :]), out, tuple(faults), given.launcher, timeout=given.timeout)
    problems += [*config_problems(config), *job_problems(job, config.nodes), *system_problems()]
    if problems:
        raise ConfigurationError(problems)
    return LabRequest(config, job)


def _parser() -> Parser:
    defaults = LabConfig()
    parser = Parser(
        "lab",
        "[OPTIONS] -- SCRIPT.py ARGS... | -- -m MODULE ARGS...",
        "Run a script under torchrun on every host of an emulated cluster. Hosts are network namespaces of this "
        "machine, connected by links of the given rates. Needs root on Linux.",
        _EXAMPLES,
    )
    cluster = parser.add_argument_group("cluster")
    nodes = defaults.nodes
    cluster.add_argument("--nodes", type=whole_number, default=nodes, metavar="N", help=f"hosts (default {nodes})")
    cluster.add_argument(
        "--workers-per-node",
        type=whole_number,
        default=defaults.workers_per_node,
        metavar="N",
        help="processes on each host (default %(default)s)",
    )
    rate = format_rate(defaults.rates[0])
    links = cluster.add_mutually_exclusive_group()
    links.add_argument(
        "--rate", default=rate, metavar="RATE", help="rate of every link, in both directions (default %(default)s)"
    )
    links.add_argument("--rates", metavar="RATES", help="rate of each host's link, such as 1gbit,1gbit,100mbit,100mbit")
    cluster.add_argument(
        "--network", default=defaults.network, metavar="CIDR", help="addresses of the hosts (default %(default)s)"
    )
    faults = parser.add_argument_group("faults")
    for kind, purpose in _FAULTS.items():
        faults.add_argument(
            f"--{kind}", action="append", default=[], metavar="FAULT", help=f"{purpose}: {form_of(kind)}"
        )
    job = parser.add_argument_group("job")
    job.add_argument(
        "--launcher",
        choices=get_args(Launcher),
        default=Job.launcher,
        help="program that runs the script. python runs it once on each host, with the number of the host in LAB_HOST "
        "(default %(default)s)",
    )
    job.add_argument("--timeout", type=number, metavar="X", help="seconds after which the run is stopped")
    folder = "folder for lab.json and logs, which is empty or new (default runs/lab-TIME)"
    job.add_argument("--out", type=Path, metavar="PATH", help=folder)
    job.add_argument("--clean", action="store_true", help="only remove leftovers of labs whose process has ended")
    return parser


_FAULTS: dict[Kind, str] = {
    "cut": "cut a host's link, permanently unless there is a duration",
    "freeze": "freeze a host's processes, permanently unless there is a duration",
    "kill": "kill a host's processes",
    "change": "change the rate of a host's link",
}
