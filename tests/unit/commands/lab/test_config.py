import pytest

from abtrain.commands.lab import LabConfig
from abtrain.commands.lab import config as module
from abtrain.commands.lab.config import HIGHEST, LOWEST, config_problems, parse_link_rate, system_problems
from abtrain.commands.lab.network import burst_bytes
from abtrain.errors import ConfigurationError


def test_the_defaults_are_valid() -> None:
    assert config_problems(LabConfig()) == []


def test_one_rate_serves_all_hosts_and_several_one_each() -> None:
    assert [LabConfig(2, (5,)).rate(host) for host in range(2)] == [5, 5]
    assert [LabConfig(2, (5, 6)).rate(host) for host in range(2)] == [5, 6]


def test_addresses() -> None:
    config = LabConfig(nodes=2, network="192.168.7.0/29")
    assert [config.address(host) for host in range(3)] == ["192.168.7.1", "192.168.7.2", "192.168.7.3"]
    assert config.prefix_length == 29


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LabConfig(nodes=0), "--nodes 0 is out of range"),
        (LabConfig(nodes=251, network="10.0.0.0/16"), "use 1 to 250 hosts"),
        (LabConfig(workers_per_node=0), "use at least 1"),
        (LabConfig(nodes=3, rates=(10**6, 10**6)), "--rates has 2 rates for 3 hosts"),
        (LabConfig(rates=(5,)), "rate 5 bit/s is out of range"),
        (LabConfig(network="10.77.0.1/24"), "has host bits set"),
        (LabConfig(network="somewhere"), "is not an IPv4 network"),
        (LabConfig(nodes=6, network="10.77.0.0/29"), "too few addresses for 6 hosts"),
        (LabConfig(name="My Lab"), "use up to 32 lower-case letters and digits"),
        (LabConfig(tolerance=0), "use a number between 0 and 1"),
    ],
)
def test_settings_that_cannot_be(config: LabConfig, problem: str) -> None:
    (found,) = config_problems(config)
    assert problem in found


def test_all_problems_are_found_at_once() -> None:
    assert len(config_problems(LabConfig(nodes=0, workers_per_node=-1, rates=(1, 2), network="x"))) == 6


def test_other_systems_and_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert system_problems() == [
        "this system is darwin: the lab needs root on Linux with iproute2 (Debian: apt-get install iproute2)"
    ]
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module.shutil, "which", lambda tool: None)
    found = system_problems()
    assert len(found) == 3 and "as user 1000" in found[0] and "'ip'" in found[1] and "'tc'" in found[2]


def test_bursts_stay_short_on_slow_links() -> None:
    assert burst_bytes(10**9) == 128 * 1024 and burst_bytes(10**6) == 16 * 1024
    assert 8 * burst_bytes(20 * 10**6) / (20 * 10**6) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("text", "rate"), [("100mbit", 10**8), ("2.5gbit", 25 * 10**8), ("100kbit", LOWEST), ("100gbit", HIGHEST)]
)
def test_rates_of_links(text: str, rate: int) -> None:
    assert parse_link_rate(text) == rate


@pytest.mark.parametrize("text", ["99kbit", "101gbit"])
def test_rates_that_no_link_has(text: str) -> None:
    with pytest.raises(ConfigurationError, match="use 100kbit to 100gbit"):
        parse_link_rate(text)
