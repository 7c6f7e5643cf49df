"""The hosts of a lab and what joins them: namespaces, a bridge, and shaped links.

The switch is a bridge in a namespace of its own, so that nothing of the lab touches the machine's network. Host i has
the interface eth0, whose other end is the switch's port i; a token bucket at either end shapes what enters the link.
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
LATENCY = "200ms"  # that a packet may queue for at most before it is dropped
CONGESTION_CONTROLS = ("cubic", "reno")
"""The first that the kernel lets a namespace take: Linux's own choice, and one that is never refused.

A machine may have another by default, whose pace would be measured with the method's: BBR, which sends by its estimate
of the rate, leaves a sixth of a link of 20 Mbit idle under a ring all-reduce.
"""
_BURST_SECONDS = 0.01
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_BURST_LEAST, _BURST_MOST = 16 * 1024, 128 * 1024


def burst_bytes(rate: int) -> int:
    """Bytes that a link of `rate` bits per second passes at once after it has been idle.

    At most 128 kB, and less on slow links: there it would be seconds' worth of traffic that was never shaped.
    """
    return min(max(int(_BURST_SECONDS * rate / 8), _BURST_LEAST), _BURST_MOST)


class Network:
    """The network of a lab.

    Args:
        config: valid.
    """

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        self.prefix = namespaces.lab_prefix(config.name)
        self.switch = f"{self.prefix}-switch"
        self.hosts = [f"{self.prefix}-host{i}" for i in range(config.nodes)]
        self.rates = [config.rate(host) for host in range(config.nodes)]

    def check_name(self) -> None:
        """
        Raises:
            ConfigurationError: this process has a lab of that name.
        """
        if namespaces.of_lab(self.prefix):
            raise ConfigurationError(f"lab {self.config.name!r} is in use by this process: give this one another name")

    def build(self) -> None:
        """
        Raises:
            LabError: the system refuses to build it.
        """
        prefix_length = self.config.prefix_length
        for name in (self.switch, *self.hosts):
            _run("ip", "netns", "add", name)
            namespaces.inside(name, _disable_ipv6)
            namespaces.inside(name, _set_congestion_control)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        # The switch's own interface is not shaped: links are measured against it, one by one.
        address = f"{self.config.address(self.config.nodes)}/{prefix_length}"
        _run("ip", "-n", self.switch, "address", "add", address, "dev", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for host in range(self.config.nodes):
            self._join(host)

    def set_rate(self, host: int, rate: int) -> None:
        """Shapes both ends of a host's link to `rate` bits per second."""
        shape = ("tbf", "rate", f"{rate}bit", "burst", str(burst_bytes(rate)), "latency", LATENCY)
        for name, device in ((self.hosts[host], INTERFACE), (self.switch, _port(host))):
            _run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *shape)
        self.rates[host] = rate

    def set_link(self, host: int, up: bool) -> None:
        """Cuts a host's link, or joins it again."""
        _run("ip", "-n", self.switch, "link", "set", _port(host), "up" if up else "down")

    def congestion_control(self) -> str:
        """The congestion control that the hosts' senders use."""
        return namespaces.inside(self.hosts[0], _CONGESTION_CONTROL.read_text).strip()

    def open_counters(self, host: int) -> FileIO:
        """The file with the counters of a host's interfaces, as the kernel counts them."""
        return namespaces.inside(self.hosts[host], lambda: FileIO("/proc/thread-self/net/dev"))

    def remove(self) -> None:
        """Removes all of it, and ends what runs in it.

        Raises:
            LabError: it cannot be removed.
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
    """Its announcements would be counted with the traffic, and its addresses might be taken for the hosts'."""
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
            f"`{' '.join(command)}` failed: {ended.stderr.strip() or ended.stdout.strip()}: the lab needs the rights "
            "to make network namespaces, and a kernel with veth, bridge and tbf"
        )
