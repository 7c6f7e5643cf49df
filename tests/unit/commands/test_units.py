"""Numbers with units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain.commands.units import format_rate, parse_rate, parse_seconds
from abtrain.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100mbit", 1e8),
        ("1.5GBIT", 1.5e9),
        ("56 kbit", 56e3),
        ("1e3bit", 1e3),
        (" 1 GBIT ", 1e9),
        (".5gbit", 5e8),
        ("1e2mbit", 1e8),
    ],
)
def test_rates(text: str, value: float) -> None:
    assert parse_rate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "100", "mbit", "-1mbit", "0mbit", "1.2.3mbit", "1mb", "100mbps", "mbit/s", "infmbit", "nanmbit", "1e999mbit"],
)
def test_rates_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigurationError, match="use a number above 0 with kbit, mbit or gbit"):
        parse_rate(text)


@given(st.integers(10**3, 10**12))
def test_a_written_rate_is_read_back(rate: int) -> None:
    assert parse_rate(format_rate(rate)) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("rate", "text"), [(95.6e6, "95.6mbit"), (999_960_000, "1gbit"), (0, "0kbit")])
def test_rates_as_they_are_written(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(("text", "value"), [("0.5ms", 5e-4), ("80us", 8e-5), ("2s", 2), ("0s", 0)])
def test_times(text: str, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "ms", "-1ms", "soon", "1h"])
def test_times_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigurationError, match="time"):
        parse_seconds(text)
