"""Bytes at the hosts' interfaces, as the kernel counts them, and the highest rates at which they passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO

from abtrain.commands.lab.network import INTERFACE

SAMPLE_SECONDS = 0.2
"""Between two samples: what a peak rate is the mean over."""


@dataclass(frozen=True)
class HostTraffic:
    """The bytes and packets that passed a host's interface.

    Attributes:
        tx_bytes, rx_bytes: transmitted and received, with Ethernet, IP and TCP headers of the packets as the host
            hands them over, before they are cut to the link's size.
        peak_tx, peak_rx: bits per second in the busiest sample.
    """

    tx_bytes: int
    rx_bytes: int
    peak_tx: float
    peak_rx: float


class Sampler:
    """Watches the counters of all hosts, from when it is made.

    Args:
        files: for each host the file with its counters; they are closed by `close`.
        now: seconds.
    """

    def __init__(self, files: Sequence[FileIO], now: float) -> None:
        self._files = files
        self._first = self._last = self._read()
        self._peaks = [(0.0, 0.0) for _ in files]
        self._time = now

    def sample(self, now: float) -> None:
        """Reads the counters, if it is time for that."""
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
        """Closes the files. A namespace lives as long as one of its counters is open."""
        for file in self._files:
            file.close()

    def _read(self) -> list[tuple[int, int]]:
        counts = []
        for file in self._files:
            file.seek(0)
            counts.append(parse_counters(file.read().decode()))
        return counts


def parse_counters(text: str) -> tuple[int, int]:
    """Transmitted and received bytes of the link, from the content of /proc/net/dev."""
    for line in text.splitlines():
        device, _, fields = line.partition(":")
        if device.strip() == INTERFACE:
            numbers = fields.split()
            return int(numbers[8]), int(numbers[0])
    raise ValueError(f"no interface {INTERFACE} among the counters")
