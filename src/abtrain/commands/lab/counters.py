"""Reads the kernel's byte counters of the hosts' interfaces, and records peak rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO

from abtrain.commands.lab.network import INTERFACE

SAMPLE_SECONDS = 0.2
"""The time between two samples. A peak rate is a mean over this time."""


@dataclass(frozen=True)
class HostTraffic:
    """The traffic of a host's network interface.

    Attributes:
        tx_bytes, rx_bytes: the bytes sent and received, including Ethernet, IP and TCP headers. Packets are counted
            before they are split to the link's MTU.
        peak_tx, peak_rx: the bits per second sent and received, each in its busiest sample.
    """

    tx_bytes: int
    rx_bytes: int
    peak_tx: float
    peak_rx: float


class Sampler:
    """Samples the byte counters of all hosts. Totals count from the construction of the sampler.

    Args:
        files: the open file /proc/net/dev of each host. `close` closes them.
        now: the current time in seconds.
    """

    def __init__(self, files: Sequence[FileIO], now: float) -> None:
        self._files = files
        self._first = self._last = self._read()
        self._peaks = [(0.0, 0.0) for _ in files]
        self._time = now

    def sample(self, now: float) -> None:
        """Reads the counters if the last sample is at least `SAMPLE_SECONDS` old."""
        if now - self._time < SAMPLE_SECONDS:
            return
        counts, seconds = self._read(), now - self._time
        for host, (tx, rx) in enumerate(counts):
            before_tx, before_rx = self._last[host]
            peak_tx, peak_rx = self._peaks[host]
            self._peaks[host] = (
                max(peak_tx, 8 * (tx - before_tx) / seconds),
                max(peak_rx, 8 * (rx - before_rx) / seconds),
            )
        self._last, self._time = counts, now

    def totals(self) -> list[HostTraffic]:
        """Returns the traffic of each host's interface so far."""
        self._last = self._read()
        ends = zip(self._first, self._last, self._peaks, strict=True)
        return [HostTraffic(tx - tx0, rx - rx0, *peaks) for (tx0, rx0), (tx, rx), peaks in ends]

    def close(self) -> None:
        """Closes the files. An open file would keep the network namespace of its host alive."""
        for file in self._files:
            file.close()

    def _read(self) -> list[tuple[int, int]]:
        counts = []
        for file in self._files:
            file.seek(0)
            counts.append(parse_counters(file.read().decode()))
        return counts


def parse_counters(text: str) -> tuple[int, int]:
    """Parses the content of /proc/net/dev, and returns the bytes sent and received over the link.

    Raises:
        ValueError: the content does not list the interface of a host.
    """
    for line in text.splitlines():
        device, _, fields = line.partition(":")
        if device.strip() == INTERFACE:
            numbers = fields.split()
            return int(numbers[8]), int(numbers[0])
    raise ValueError(f"/proc/net/dev does not list the interface {INTERFACE}")
