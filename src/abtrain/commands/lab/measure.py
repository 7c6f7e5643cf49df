"""Measures links before a job uses them, by short TCP transfers from each host to the switch and back."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from abtrain.commands.lab import namespaces
from abtrain.commands.lab.network import Network, burst_bytes
from abtrain.commands.units import format_rate
from abtrain.errors import LabError

WIRE_SHARE = 1448 / 1514
"""TCP payload over the bytes that the shaper of a link counts, which include Ethernet, IP and TCP headers."""
_SECONDS = 0.2
_LEAST_BYTES = 256 * 1024
_ATTEMPTS = 5  # a low rate may mean that the machine is busy, not that the link is slow
_SILENCE_SECONDS = 5.0
_SETTLE_SECONDS = 0.4  # time for queues at the ends of links to drain, so that a job's counters do not include them
# The total rate in bits per second up to which all links can be measured at the same time.
_AT_ONCE = 500 * 10**6


def verify_links(network: Network) -> list[tuple[float, float]]:
    """Measures every host's link, up to the switch and down from it.

    Returns:
        The rates (up, down) of each host's link in bits per second, headers included.

    Raises:
        LabError: the rates of some links differ from their settings by more than the tolerance.
    """
    hosts = range(network.config.nodes)
    alone = sum(network.rates) > _AT_ONCE
    with ThreadPoolExecutor(1 if alone else len(hosts), initializer=_come_first) as pool:
        measured = list(pool.map(lambda host: _measure_host(network, host), hosts))
    problems = [
        f"host {host}: the link {way} carries {format_rate(rate)} instead of {format_rate(network.rates[host])}, and "
        f"only a difference of {network.config.tolerance:.0%} is allowed"
        for host in hosts
        for way, rate in zip(("up", "down"), measured[host], strict=True)
        if not _fits(rate, network.rates[host], network.config.tolerance)
    ]
    if problems:
        raise LabError("\n".join([*problems, "this machine is too busy or too slow for these rates: use lower ones"]))
    time.sleep(_SETTLE_SECONDS)
    return measured


def _measure_host(network: Network, host: int) -> tuple[float, float]:
    inside, switch = network.hosts[host], network.switch
    return _closest(network, host, inside, switch), _closest(network, host, switch, inside)


def _closest(network: Network, host: int, sender: str, receiver: str) -> float:
    """Measures a link's rate up to `_ATTEMPTS` times, and returns the value closest to the configured rate."""
    config, rate = network.config, network.rates[host]
    address = config.address(host if receiver == network.hosts[host] else config.nodes)
    best = 0.0
    for _ in range(_ATTEMPTS):
        try:
            measured = _transfer(sender, receiver, address, rate) / WIRE_SHARE
        except OSError as error:
            raise LabError(
                f"host {host} and the switch cannot reach each other: {error}. Try again, or use fewer hosts"
            ) from None
        best = min(best, measured, key=lambda value: abs(value - rate))
        if _fits(best, rate, config.tolerance):
            break
    return best


def _fits(measured: float, rate: int, tolerance: float) -> bool:
    return abs(measured - rate) <= tolerance * rate


def _transfer(sender: str, receiver: str, address: str, rate: int) -> float:
    """Transfers data from one namespace to another, and returns the rate of the TCP payload in bits per second."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(namespaces.inside(receiver, lambda: socket.create_server((address, 0))))
        source = stack.enter_context(namespaces.inside(sender, socket.socket))
        listener.settimeout(_SILENCE_SECONDS)
        source.settimeout(_SILENCE_SECONDS)
        source.connect(listener.getsockname())
        sink = stack.enter_context(listener.accept()[0])
        sink.settimeout(_SILENCE_SECONDS)
        sending = threading.Thread(target=_send, args=(source,))
        sending.start()
        try:
            return _receive(sink, skip=burst_bytes(rate) + 64 * 1024, count=max(int(_SECONDS * rate / 8), _LEAST_BYTES))
        finally:
            sink.close()
            sending.join()


def _come_first() -> None:
    """Raises the priority of this thread. Otherwise a link would appear slow on a busy machine."""
    with contextlib.suppress(OSError):  # without permission, a busy machine may fail the measurement
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _send(source: socket.socket) -> None:
    _come_first()
    block = bytes(64 * 1024)
    with contextlib.suppress(OSError):  # the receiver closes the connection when it has enough data
        while True:
            source.sendall(block)


def _receive(sink: socket.socket, skip: int, count: int) -> float:
    """Returns the rate in bits per second of `count` bytes. It ignores the first `skip` bytes, which are not shaped."""
    buffer = bytearray(256 * 1024)
    seen = 0
    while seen < skip:
        seen += _some(sink, buffer)
    first, started = seen, time.perf_counter()
    while seen < first + count:
        seen += _some(sink, buffer)
    return 8 * (seen - first) / (time.perf_counter() - started)


def _some(sink: socket.socket, buffer: bytearray) -> int:
    count = sink.recv_into(buffer)
    if not count:
        raise ConnectionError("the sender closed the connection during the transfer")
    return count
