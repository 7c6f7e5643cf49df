"""Defines and validates the settings of a lab."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import sys
from dataclasses import dataclass

from abtrain.commands.units import format_rate, parse_rate
from abtrain.errors import ConfigurationError

LOWEST, HIGHEST = 100 * 10**3, 100 * 10**9
"""The lowest and the highest rate of a lab's link, in bits per second."""
MOST_HOSTS = 250  # one bridge and one machine can carry about this many trees of processes
_REMEDY = "the lab needs root on Linux with iproute2 (Debian: apt-get install iproute2)"


@dataclass(frozen=True)
class LabConfig:
    """An emulated cluster: hosts that are connected to a switch, each by its own link.

    Attributes:
        nodes: the number of hosts.
        rates: the rates of the links in bits per second: one rate for all hosts, or one for each host. A rate applies
            to both directions.
        workers_per_node: the number of processes that torchrun starts on each host.
        network: the IPv4 network of the hosts' addresses. They are visible only inside the lab.
        name: a name that no other lab of the same process has.
        tolerance: the largest relative difference between a link's measured rate and its configured rate.
    """

    nodes: int = 4
    rates: tuple[int, ...] = (100 * 10**6,)
    workers_per_node: int = 1
    network: str = "10.77.0.0/24"
    name: str = "lab"
    tolerance: float = 0.15

    def rate(self, host: int) -> int:
        """Returns the rate of a host's link in bits per second."""
        return self.rates[host if len(self.rates) > 1 else 0]

    def address(self, host: int) -> str:
        """Returns the IP address of a host. Host number `nodes` is the switch."""
        return str(ipaddress.IPv4Network(self.network)[host + 1])

    @property
    def prefix_length(self) -> int:
        """The length of the network's prefix in bits."""
        return ipaddress.IPv4Network(self.network).prefixlen


def parse_link_rate(text: str) -> int:
    """Parses the rate of a link, such as `100mbit`, into whole bits per second.

    Raises:
        ConfigurationError: the string is not a rate, or the rate is outside the range of a lab's links.
    """
    rate = round(parse_rate(text))
    if not LOWEST <= rate <= HIGHEST:
        raise ConfigurationError(f"rate {text!r} is out of range: use {format_rate(LOWEST)} to {format_rate(HIGHEST)}")
    return rate


def config_problems(config: LabConfig) -> list[str]:
    """Returns a message for each invalid setting; empty if all settings are valid."""
    problems = []
    if not 1 <= config.nodes <= MOST_HOSTS:
        problems.append(f"--nodes {config.nodes} is out of range: use 1 to {MOST_HOSTS} hosts")
    if config.workers_per_node < 1:
        problems.append(f"--workers-per-node {config.workers_per_node} is too small: use at least 1")
    if len(config.rates) not in (1, config.nodes):
        problems.append(
            f"--rates has {len(config.rates)} rates for {config.nodes} hosts: give one rate for each host, or one for "
            "all with --rate"
        )
    for rate in config.rates:
        if not LOWEST <= rate <= HIGHEST:
            problems.append(f"rate {rate} bit/s is out of range: use {LOWEST} to {HIGHEST} bit/s")
    if not re.fullmatch("[a-z0-9]{1,32}", config.name):
        problems.append(f"name {config.name!r} is not valid: use up to 32 lower-case letters and digits")
    if not 0 < config.tolerance < 1:
        problems.append(f"tolerance {config.tolerance} is out of range: use a number between 0 and 1")
    return problems + _network_problems(config)


def system_problems() -> list[str]:
    """Returns a message for each reason why this system cannot run a lab; empty if it can."""
    if sys.platform != "linux":
        return [f"this system is {sys.platform}: {_REMEDY}"]
    problems = []
    if os.geteuid() != 0:
        problems.append(f"the command runs as user {os.geteuid()}: {_REMEDY}")
    problems += [f"the command {tool!r} is not installed: {_REMEDY}" for tool in ("ip", "tc") if not shutil.which(tool)]
    return problems


def _network_problems(config: LabConfig) -> list[str]:
    try:
        network = ipaddress.IPv4Network(config.network)
    except ValueError as error:
        return [f"--network {config.network!r} is not an IPv4 network ({error}): use one such as {LabConfig.network}"]
    # The network, the switch and the broadcast need an address each.
    if network.num_addresses < config.nodes + 3:
        return [
            f"--network {config.network} has too few addresses for {config.nodes} hosts: use a shorter prefix, "
            "such as /16"
        ]
    return []
