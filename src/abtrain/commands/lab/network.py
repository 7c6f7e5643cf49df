"""Builds the network of a lab: a namespace for each host, a bridge as the switch, and rate-limited links.

The bridge has a separate namespace, so the machine's own network stays unchanged. The interface eth0 of host i is
connected to port i of the bridge. A token bucket at each end shapes the traffic that enters the link.
"""

from __future__ import annotations

import contextlib
import subprocess
from io import FileIO
from pathlib import Path

from abtrain.commands.lab import namespaces
from abtrain.commands.lab.config import LabConfig
from abtrain.errors import ConfigurationError, LabError

INTERFACE = "eth0"
LATENCY = "200ms"  # the longest time that a packet may queue; it is dropped after that
CONGESTION_CONTROLS = ("cubic", "reno")
"""Congestion controls to try, in this order. cubic is Linux's default, and the kernel always allows reno.

The machine's own setting may distort measurements: BBR, which estimates the rate, leaves a sixth of a link of
20 Mbit/s idle during a ring all-reduce.
"""
_BURST_SECONDS = 0.01
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_BURST_LEAST, _BURST_MOST = 16 * 1024, 128 * 1024


def burst_bytes(rate: int) -> int:
    """Returns the number of bytes that an idle link of `rate` bits per second lets pass unshaped.

    It is at most 128 kB. On slow links it is less, because 128 kB would equal seconds of traffic there.
    """
    return min(max(int(_BURST_SECONDS * rate / 8), _BURST_LEAST), _BURST_MOST)


class Network:
    """The namespaces and links of a lab whose configuration is valid."""

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        self.prefix = namespaces.lab_prefix(config.name)
        self.switch = f"{self.prefix}-switch"
        self.hosts = [f"{self.prefix}-host{i}" for i in range(config.nodes)]
        self.rates = [config.rate(host) for host in range(config.nodes)]

    def check_name(self) -> None:
        """Checks that this process has no other lab with the same name.

        Raises:
            ConfigurationError: the process has another lab with this name.
        """
        if namespaces.of_lab(self.prefix):
            raise ConfigurationError(
                f"name {self.config.name!r} belongs to another lab of this process: use another name"
            )

    def build(self) -> None:
        """Creates all namespaces and links.

        Raises:
            LabError: a command that creates the network failed.
        """
        prefix_length = self.config.prefix_length
        for name in (self.switch, *self.hosts):
            _run("ip", "netns", "add", name)
            namespaces.inside(name, _disable_ipv6)
            namespaces.inside(name, _set_congestion_control)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        # The switch's own interface is not shaped, so that it can measure the links.
        address = f"{self.config.address(self.config.nodes)}/{prefix_length}"
        _run("ip", "-n", self.switch, "address", "add", address, "dev", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for host in range(self.config.nodes):
            self._join(host)

    def set_rate(self, host: int, rate: int) -> None:
        """Limits both directions of a host's link to `rate` bits per second."""
        shape = ("tbf", "rate", f"{rate}bit", "burst", str(burst_bytes(rate)), "latency", LATENCY)
        for name, device in ((self.hosts[host], INTERFACE), (self.switch, _port(host))):
            _run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *shape)
        self.rates[host] = rate

    def set_link(self, host: int, up: bool) -> None:
        """Connects or disconnects a host's link."""
        _run("ip", "-n", self.switch, "link", "set", _port(host), "up" if up else "down")

    def congestion_control(self) -> str:
        """Returns the name of the TCP congestion control on the hosts."""
        return namespaces.inside(self.hosts[0], _CONGESTION_CONTROL.read_text).strip()

    def open_counters(self, host: int) -> FileIO:
        """Opens /proc/net/dev of a host, which contains the kernel's byte counters."""
        return namespaces.inside(self.hosts[host], lambda: FileIO("/proc/thread-self/net/dev"))

    def remove(self) -> None:
        """Removes all namespaces, and ends the processes in them.

        Raises:
            LabError: a namespace cannot be removed.
        """
        namespaces.remove_lab(self.prefix)

    def _join(self, host: int) -> None:
        name, port = self.hosts[host], _port(host)
        address = f"{self.config.address(host)}/{self.config.prefix_length}"
        pair = ("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
        _run("ip", "-n", self.switch, *pair)
        _run("ip", "-n", name, "address", "add", address, "dev", INTERFACE)
        self.set_rate(host, self.rates[host])
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        _run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")


def _port(host: int) -> str:
    return f"port{host}"


def _disable_ipv6() -> None:
    """Disables IPv6. Otherwise the counters would include IPv6 announcements, and programs might use IPv6 addresses."""
    with contextlib.suppress(OSError):  # a kernel without IPv6
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")


def _set_congestion_control() -> None:
    for name in CONGESTION_CONTROLS:
        with contextlib.suppress(OSError):
            _CONGESTION_CONTROL.write_text(name)
            return


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise LabError(
            f"`{' '.join(command)}` failed: {ended.stderr.strip() or ended.stdout.strip()}: the lab needs permission "
            "to create network namespaces, and a kernel with veth, bridge and tbf"
        )
