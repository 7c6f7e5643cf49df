"""The configuration of a lab, and its validation."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import sys
from dataclasses import dataclass

from abtrain.commands.lab.rates import HIGHEST, LOWEST

MOST_HOSTS = 250  # what one bridge and this many trees of processes still make sense for
_REMEDY = "the lab needs root on Linux with iproute2 (Debian: apt-get install iproute2)"


@dataclass(frozen=True)
class LabConfig:
    """An emulated cluster: hosts joined by a switch, each by a link of its own.

    Attributes:
        nodes: hosts.
        rates: bits per second of the links, the same both ways: one for all hosts, or one for each.
        workers_per_node: processes that torchrun starts on each host.
        network: the hosts' addresses; they are visible inside the lab only.
        name: tells labs of one process apart.
        tolerance: share by which a link's measured rate may be off.
    """

    nodes: int = 4
    rates: tuple[int, ...] = (100 * 10**6,)
    workers_per_node: int = 1
    network: str = "10.77.0.0/24"
    name: str = "lab"
    tolerance: float = 0.15

    def rate(self, host: int) -> int:
        """Bits per second of a host's link."""
        return self.rates[host if len(self.rates) > 1 else 0]

    def address(self, host: int) -> str:
        """The address of a host; that of number `nodes` belongs to the switch."""
        return str(ipaddress.IPv4Network(self.network)[host + 1])

    @property
    def prefix_length(self) -> int:
        """Bits of an address that all hosts have alike."""
        return ipaddress.IPv4Network(self.network).prefixlen


def config_problems(config: LabConfig) -> list[str]:
    """Everything that is wrong with the settings, a message each."""
    problems = []
    if not 1 <= config.nodes <= MOST_HOSTS:
        problems.append(f"{config.nodes} hosts cannot be: use 1 to {MOST_HOSTS} --nodes")
    if config.workers_per_node < 1:
        problems.append(f"--workers-per-node {config.workers_per_node} is too small: use at least 1")
    if len(config.rates) not in (1, config.nodes):
        problems.append(
            f"{len(config.rates)} rates for {config.nodes} hosts: give --rates one for each host, or --rate one for all"
        )
    for rate in config.rates:
        if not LOWEST <= rate <= HIGHEST:
            problems.append(f"a rate of {rate} bit/s is out of range: use {LOWEST} to {HIGHEST}")
    if not re.fullmatch("[a-z0-9]{1,32}", config.name):
        problems.append(f"name {config.name!r} cannot be: use up to 32 small letters and digits")
    if not 0 < config.tolerance < 1:
        problems.append(f"a tolerance of {config.tolerance} cannot be: use a share between 0 and 1")
    return problems + _network_problems(config)


def system_problems() -> list[str]:
    """Why this system cannot run a lab, a message each."""
    if sys.platform != "linux":
        return [f"no lab on {sys.platform}: {_REMEDY}"]
    problems = []
    if os.geteuid() != 0:
        problems.append(f"no lab as user {os.geteuid()}: {_REMEDY}")
    problems += [f"no lab without the command {tool!r}: {_REMEDY}" for tool in ("ip", "tc") if not shutil.which(tool)]
    return problems


def _network_problems(config: LabConfig) -> list[str]:
    try:
        network = ipaddress.IPv4Network(config.network)
    except ValueError as error:
        return [f"--network {config.network!r} is no IPv4 network ({error}): use one such as {LabConfig.network}"]
    # Beside the hosts: the network's own address, that of the switch, and the broadcast address.
    if network.num_addresses < config.nodes + 3:
        return [
            f"--network {config.network} has too few addresses for {config.nodes} hosts: use one with a shorter mask"
        ]
    return []
