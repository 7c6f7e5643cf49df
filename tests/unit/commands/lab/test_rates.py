import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain.commands.lab.rates import HIGHEST, LOWEST, format_rate, parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 10**8),
        ("2.5gbit", 25 * 10**8),
        ("500kbit", 5 * 10**5),
        (" 1 GBIT ", 10**9),
        (".5gbit", 5 * 10**8),
        ("1e8bit", 10**8),
        ("1e2mbit", 10**8),
    ],
)
def test_rates_as_people_write_them(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "100", "mbit", "100mbps", "-5mbit", "1e999mbit", "100 mbit/s", "nanmbit"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="use a number with kbit, mbit or gbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0mbit", "99kbit", "101gbit"])
def test_rates_that_no_link_has(text: str) -> None:
    with pytest.raises(ValueError, match="use 100kbit to 100gbit"):
        parse_rate(text)


@given(st.integers(LOWEST, HIGHEST))
def test_a_written_rate_is_read_back(rate: int) -> None:
    assert parse_rate(format_rate(rate)) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("rate", "text"), [(95.6e6, "95.6mbit"), (999_960_000, "1gbit"), (0, "0kbit")])
def test_rates_as_they_are_written(rate: float, text: str) -> None:
    assert format_rate(rate) == text
