import pytest

from abtrain.commands.lab.rates import HIGHEST, LOWEST, parse_link_rate
from abtrain.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "rate"), [("100mbit", 10**8), ("2.5gbit", 25 * 10**8), ("100kbit", LOWEST), ("100gbit", HIGHEST)]
)
def test_rates_of_links(text: str, rate: int) -> None:
    assert parse_link_rate(text) == rate


@pytest.mark.parametrize("text", ["99kbit", "101gbit"])
def test_rates_that_no_link_has(text: str) -> None:
    with pytest.raises(ConfigurationError, match="use 100kbit to 100gbit"):
        parse_link_rate(text)
