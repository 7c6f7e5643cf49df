"""The arguments of `abtrain lab`: read, and all that is wrong with them said at once."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from abtrain.commands.lab.config import LabConfig, config_problems, system_problems
from abtrain.commands.lab.faults import Kind, LabFault, form_of, parse_fault
from abtrain.commands.lab.job import Job, Launcher, job_problems
from abtrain.commands.lab.rates import parse_link_rate
from abtrain.commands.units import format_rate
from abtrain.errors import ConfigurationError

Value = TypeVar("Value")

_EXAMPLES = """\
examples:
  abtrain lab --nodes 4 --rate 100mbit -- train.py --steps 100
  abtrain lab --rates 1gbit,1gbit,100mbit,20mbit -- -m abtrain train ab_outer --task digits-mlp
  abtrain lab --cut 3@20s+10s --change 2@10s=20mbit -- train.py

Bytes are counted at the hosts' interfaces and written to lab.json. A fault's time counts from the command's start."""


@dataclass(frozen=True)
class LabRequest:
    """The lab and the command that a command line asks for.

    Attributes:
        config: of the lab.
        job: what to run in it; None if leftovers are to be removed, and no more.
    """

    config: LabConfig
    job: Job | None


def parse_arguments(arguments: Sequence[str]) -> LabRequest:
    """Parses a command line and checks that this system can run it.

    Raises:
        ConfigurationError: all that is wrong.
        SystemExit: --help, or an option that there is not.
    """
    own = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = _parser().parse_args(arguments[:own])
    if given.clean:
        return LabRequest(LabConfig(), None)
    problems: list[str] = []
    rates = _all(given.rates.split(",") if given.rates else [given.rate], parse_link_rate, problems)
    faults: list[LabFault] = []
    for kind in get_args(Kind):
        faults += _all(getattr(given, kind), functools.partial(parse_fault, kind), problems)
    # A rate that cannot be read has been reported; its place is taken by one that can be.
    config = LabConfig(
        given.nodes, tuple(rates) if not problems else LabConfig.rates, given.workers_per_node, given.network
    )
    out = given.out or Path("runs") / f"lab-{time.strftime('%Y%m%d-%H%M%S')}"
    job = Job(tuple(arguments[own + 1 :]), out, tuple(faults), given.launcher, timeout=given.timeout)
    problems += [*config_problems(config), *job_problems(job, config.nodes), *system_problems()]
    if problems:
        raise ConfigurationError(problems)
    return LabRequest(config, job)


def _all(texts: Sequence[str], parse: Callable[[str], Value], problems: list[str]) -> list[Value]:
    """Parses all texts; the problem of each that cannot be parsed is added to `problems`."""
    values = []
    for text in texts:
        try:
            values.append(parse(text))
        except ConfigurationError as error:
            problems += error.problems
    return values


def _parser() -> argparse.ArgumentParser:
    defaults = LabConfig()
    parser = argparse.ArgumentParser(
        prog="abtrain lab",
        usage="%(prog)s [options] -- SCRIPT.py ARGS... | -- -m MODULE ARGS...",
        description="Runs a script under torchrun on every host of an emulated cluster: hosts are network namespaces "
        "of this machine, joined by links of the given rates. Needs root on Linux.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help="hosts (default %(default)s)")
    rate = format_rate(defaults.rates[0])
    links = parser.add_mutually_exclusive_group()
    links.add_argument("--rate", default=rate, help="of every link, both ways (default %(default)s)")
    links.add_argument("--rates", help="of each host's link: 1gbit,1gbit,100mbit,100mbit")
    parser.add_argument(
        "--workers-per-node", type=int, default=defaults.workers_per_node, help="processes a host (default %(default)s)"
    )
    for kind, purpose in _FAULTS.items():
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="FAULT", help=f"{purpose}: {form_of(kind)}"
        )
    parser.add_argument(
        "--launcher",
        choices=get_args(Launcher),
        default=Job.launcher,
        help="what runs the script; python: once on each host, its number in LAB_HOST (default %(default)s)",
    )
    parser.add_argument("--network", default=defaults.network, help="the hosts' addresses (default %(default)s)")
    parser.add_argument("--timeout", type=float, help="seconds after which the run is ended")
    parser.add_argument("--out", type=Path, help="folder for lab.json and logs (default runs/lab-TIME)")
    parser.add_argument("--clean", action="store_true", help="remove what is left of dead labs, and do no more")
    return parser


_FAULTS: dict[Kind, str] = {
    "cut": "cut a host's link; without a duration for good",
    "freeze": "freeze a host's processes; without a duration for good",
    "kill": "kill a host's processes",
    "change": "change the rate of a host's link",
}
