from io import FileIO
from pathlib import Path

import pytest

from abtrain.commands.lab.counters import HostTraffic, Sampler, parse_counters

TEXT = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls
    lo:     777       0    0    0    0     0          0         0      777       0    0    0    0     0       0
  eth0: {rx}      9    0    0    0     0          0         0 {tx}      12    0    0    0     0       0          0
"""


def write(path: Path, tx: int, rx: int) -> None:
    path.write_text(TEXT.format(tx=tx, rx=rx))


def test_counters_are_those_of_the_link() -> None:
    assert parse_counters(TEXT.format(tx=5, rx=123456789)) == (5, 123456789)
    with pytest.raises(ValueError, match="does not list the interface eth0"):
        parse_counters(TEXT.replace("eth0", "eth1"))


def test_totals_and_peaks(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    write(path, 1000, 0)
    sampler = Sampler([FileIO(path)], now=10.0)
    write(path, 2000, 50)
    sampler.sample(10.1)  # too early: this is part of the next sample
    write(path, 3000, 100)
    sampler.sample(10.5)
    write(path, 3500, 300)
    sampler.sample(11.0)
    write(path, 3600, 300)
    assert sampler.totals() == [HostTraffic(2600, 300, peak_tx=8 * 2000 / 0.5, peak_rx=8 * 200 / 0.5)]
    sampler.close()
